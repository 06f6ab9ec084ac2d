"""Scores the best checkpoint of a run, or compares those of two runs on the same text.

python scripts/evaluate.py run=RUN_DIR evaluators=[static,dynamic,cache,mc_dropout]
python scripts/evaluate.py run=RUN_DIR evaluators=[dynamic] evaluators.dynamic.lr=[1e-4,3e-4]
python scripts/evaluate.py compare=[RUN_A,RUN_B]
python scripts/evaluate.py compare=[[A_SEED1,A_SEED2],[B_SEED1,B_SEED2]] out=FILE.json

The evaluators are the files of configs/evaluators; their settings are in docs/options.md. Those
that are lists are tuned on the validation text, and test is scored once. The
run's summary.json takes the scores in; tuning.json holds every trial. The differences of a
comparison go to out as well, if it is given. What else may be given, as to train.py: data.dir,
data.cache_dir, trainer.device, trainer.threads.
"""

import logging
import sys
from functools import partial
from pathlib import Path

import yaml

from mogrifier_lm.config import Config
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import write_json
from mogrifier_lm.launch.cli import script
from mogrifier_lm.launch.job import compose
from mogrifier_lm.launch.overrides import resume_config
from mogrifier_lm.reports.table import score_table
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.terminal import plain

# What may be given beside the run itself, which is scored as it was trained.
SCORABLE = ("evaluators", "data.dir=", "data.cache_dir=", "trainer.device=", "trainer.threads=")


def main(*overrides: str, run: str = "", compare: str = "", out: Path | None = None) -> None:
    if bool(run) == bool(compare):
        raise UserError("give either run=RUN_DIR or compare=[RUN_A,RUN_B]")
    if run and out:
        raise UserError("out= is of compare=; a run's scores go to its own summary.json")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    node = compose(overrides)

    def load(path: str) -> tuple[Config, RunFolder]:
        folder = RunFolder(path)
        return resume_config(node, folder.config, overrides, SCORABLE), folder

    if run:
        config, folder = load(run)
        from mogrifier_lm.runs.evaluate import evaluate_run
        from mogrifier_lm.texts.fetch import fetch

        fetch(config.data)
        return print(plain(f"\n{score_table(evaluate_run(config, folder))}"))
    # Every scalar a text: 01 is the name of a folder.
    sides = yaml.load(compare, yaml.BaseLoader)
    if not isinstance(sides, list) or len(sides) != 2:
        raise UserError(
            f"compare={compare}: compare=[RUN_A,RUN_B] takes two runs, or two lists of runs"
        )
    sides = [side if isinstance(side, list) else [side] for side in sides]
    runs = [[load(path) for path in side] for side in sides]
    from mogrifier_lm.reports.compare import compare_runs

    figures = compare_runs(runs)
    if out:
        write_json(out, {"A": sides[0], "B": sides[1]} | figures)


command = partial(script, main)
