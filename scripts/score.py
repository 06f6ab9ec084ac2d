"""What each word of a text costs: see `python scripts/score.py --help`."""

from mogrifier_lm.launch.commands.score import command

if __name__ == "__main__":
    command()
