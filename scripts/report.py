"""The report of a run or of a sweep: see `python scripts/report.py --help`."""

from mogrifier_lm.launch.commands.report import command

if __name__ == "__main__":
    command()
