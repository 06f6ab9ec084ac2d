"""Minimal pairs: see `python scripts/pairs.py --help`."""

from mogrifier_lm.launch.commands.pairs import command

if __name__ == "__main__":
    command()
