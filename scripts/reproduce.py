"""Reproduces a published curve run by run: see `python scripts/reproduce.py --help`."""

from mogrifier_lm.launch.commands.reproduce import command

if __name__ == "__main__":
    command()
