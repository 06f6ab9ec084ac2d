"""A trained model to give away: see `python scripts/export.py --help`."""

from mogrifier_lm.launch.commands.export import command

if __name__ == "__main__":
    command()
