"""Times the kernels: see `python scripts/benchmark.py --help`."""

from mogrifier_lm.launch.commands.benchmark import command

if __name__ == "__main__":
    command()
