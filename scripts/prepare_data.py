"""Fetches, checks and counts a text: see `python scripts/prepare_data.py --help`."""

from mogrifier_lm.launch.commands.prepare_data import command

if __name__ == "__main__":
    command()
