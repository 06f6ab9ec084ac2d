"""Searches for the best values of some keys: an Optuna study over runs of train.py.

    python scripts/search.py dir=runs/search space=small experiment=ptb_small trials=50
    python scripts/search.py dir=runs/search space=melis2020 experiment=ptb_mogrifier_24m jobs=2
    python scripts/search.py dir=runs/search space=my.yaml data=text data.dir=FOLDER model.rounds=4

The same command with the same dir goes on: ended trials are kept, those that were cut go on from
their checkpoints. Keys of its own; every other argument is an override of each trial's run:

    dir            the study (study.log), the runs 0, 1, 2, ..., and report/ with the best trials
    space          mogrifier_lm/search/NAME.yaml or a file like it; a key in it that is given as an
                   override is not searched
    trials=50      in all, those of earlier commands and the pruned and failed ones counted
    jobs=1         trials at once; each gets its share of the cores unless trainer.threads says
    startup=10     trials drawn at random before TPE proposes, completed before one is pruned
    warmup=3       validations of a run until it may be pruned, as it is once its best perplexity
                   is worse than that of three quarters of the completed trials at that point
    sampler_seed=0 of what is drawn; seed=N is that of each run

A trial's value is the log of the validation perplexity of its first evaluator. Test perplexities
stand in the report beside it and decide nothing.
"""

from functools import partial
from pathlib import Path

from mogrifier_lm.launch.cli import script
from mogrifier_lm.search.search import Search


def main(
    *overrides: str,
    dir: Path,
    space: str,
    trials: int = 50,
    jobs: int = 1,
    startup: int = 10,
    warmup: int = 3,
    sampler_seed: int = 0,
) -> None:
    Search(
        overrides=overrides,
        dir=dir,
        space=space,
        trials=trials,
        jobs=jobs,
        startup=startup,
        warmup=warmup,
        sampler_seed=sampler_seed,
    ).run()


command = partial(script, main, "; the same command goes on")
