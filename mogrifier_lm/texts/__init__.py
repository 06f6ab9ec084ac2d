"""Texts that are made or downloaded before anything reads them; only here is a network."""
