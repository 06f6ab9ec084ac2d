"""A run and its folder: built from a config, trained, scored, described."""
