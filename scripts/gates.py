"""What the rounds do: see `python scripts/gates.py --help`."""

from mogrifier_lm.launch.commands.gates import command

if __name__ == "__main__":
    command()
