"""Prints a file for `wandb sweep`: W&B's own sweep of a named grid, or its search of a space.

    python scripts/wandb_sweep.py sweep=rounds_by_hidden > sweep.yaml
    python scripts/wandb_sweep.py space=melis2020 experiment=ptb_mogrifier_24m > sweep.yaml
    wandb sweep sweep.yaml     # then `wandb agent ID`, from the folder of train.py, on each machine

sweep is a grid of configs/sweep/, space one of mogrifier_lm/search/ or a file like it: W&B searches
it by Bayes and ends what is not among the best third after 30, 90, 270, ... validations. Every
other argument is an override of each run.
"""

from functools import partial

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script
from mogrifier_lm.tracking.wandb_sweep import grid_file, search_file


def main(*overrides: str, sweep: str = "", space: str = "") -> None:
    if bool(sweep) == bool(space):
        raise UserError("give either sweep=NAME or space=NAME")
    print(grid_file(sweep, overrides) if sweep else search_file(space, overrides), end="")


command = partial(script, main)
