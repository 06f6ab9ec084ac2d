"""A hyperparameter search: see `python scripts/search.py --help`."""

from mogrifier_lm.launch.commands.search import command

if __name__ == "__main__":
    command()
