"""A file for `wandb sweep`: see `python scripts/wandb_sweep.py --help`."""

from mogrifier_lm.launch.commands.wandb_sweep import command

if __name__ == "__main__":
    command()
