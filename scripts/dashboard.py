"""W&B's panels of a project or a sweep: see `python scripts/dashboard.py --help`."""

from mogrifier_lm.launch.commands.dashboard import command

if __name__ == "__main__":
    command()
