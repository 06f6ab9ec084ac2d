"""Text of a trained model's own: see `python scripts/generate.py --help`."""

from mogrifier_lm.launch.commands.generate import command

if __name__ == "__main__":
    command()
