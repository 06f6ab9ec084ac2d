"""Scores a checkpoint, or compares two runs: see `python scripts/evaluate.py --help`."""

from mogrifier_lm.launch.commands.evaluate import command

if __name__ == "__main__":
    command()
