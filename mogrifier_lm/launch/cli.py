"""Command lines: what train.py, the scripts and the console command call.

Imports here are light: torch, datasets and wandb come in when a run needs them.
"""

import inspect
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml

from mogrifier_lm.config import CONFIG_DIR, resume_config
from mogrifier_lm.errors import UserError, nearest
from mogrifier_lm.launch.explain import EXPECTED, explain, of_launcher
from mogrifier_lm.launch.job import compose, train_job
from mogrifier_lm.options import Config
from mogrifier_lm.reports.table import score_table
from mogrifier_lm.training import parallel


def guarded(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Run an entry point; the user's errors become one line and exit code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on and leaves the words to us
    debug = "debug=true" in (argument.lower() for argument in sys.argv)
    try:
        main()
    except EXPECTED as error:
        if debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, NameError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        plugins = ("/joblib/", "/submitit/")
        if debug or not any(name in frame.filename for frame in frames for name in plugins):
            raise
        print(f"error: {of_launcher(error)}", file=sys.stderr)
        sys.exit(1)
    except AssertionError as error:  # OmegaConf's, for a key of a group that is null
        if "Unexpected type for root" not in str(error):
            raise
        keys = [a.partition("=")[0] for a in sys.argv[1:] if "." in a.partition("=")[0]]
        print(
            f"error: one of {', '.join(keys)} is a key of a group that is not there: an evaluator "
            "has to be named beside it, evaluators=[NAME]",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted{after_interrupt}", file=sys.stderr)
        sys.exit(130)


def train() -> None:
    """The command `python train.py`."""
    if parallel.RANK:  # the first process speaks for all
        logging.disable(logging.CRITICAL)
        os.environ["TQDM_DISABLE"] = "1"
    main = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")

    def run() -> None:
        try:
            main(train_job)()
        except Exception:
            if parallel.RANK:  # where the first has failed too, torchrun ends this one meanwhile
                time.sleep(5)
            raise

    guarded(
        run, "; resume=RUN_DIR goes on from the last checkpoint, hydra.sweep.dir=DIR with a sweep"
    )


# What may be given beside the run itself, which is scored as it was trained.
SCORABLE = (
    "debug=",
    "evaluators",
    "data.dir=",
    "data.cache_dir=",
    "trainer.device=",
    "trainer.threads=",
)


def evaluate() -> None:
    """The command `python scripts/evaluate.py`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    guarded(_evaluate)


def _evaluate() -> None:
    own = [a for a in sys.argv[1:] if a.startswith(("run=", "compare="))]
    overrides = [a for a in sys.argv[1:] if a not in own]
    if len(own) != 1:
        raise UserError("give either run=RUN_DIR or compare=[RUN_A,RUN_B]")
    node = compose(overrides)

    def load(folder: str) -> tuple[Config, Path]:
        return resume_config(node, Path(folder), overrides, SCORABLE), Path(folder)

    if own[0].startswith("run="):
        config, folder = load(own[0].removeprefix("run="))
        from mogrifier_lm.runs.evaluate import evaluate_run

        return print(f"\n{score_table(evaluate_run(config, folder))}")
    # Every scalar a text: 01 is the name of a folder.
    sides = yaml.load(own[0].removeprefix("compare="), yaml.BaseLoader)
    if not isinstance(sides, list) or len(sides) != 2:
        raise UserError(f"{own[0]}: compare=[RUN_A,RUN_B] takes two runs, or two lists of runs")
    runs = [[load(f) for f in (side if isinstance(side, list) else [side])] for side in sides]
    from mogrifier_lm.runs.evaluate import compare_runs

    compare_runs(runs)


def script(main: Callable[..., None], after_interrupt: str = "") -> None:
    """Call `main` with the KEY=VALUE arguments of the command line.

    The keys, their types and defaults are those of its parameters; *overrides among them take the
    arguments of other keys as they are. Its module's docstring is what --help shows.
    """
    arguments = [a for a in sys.argv[1:] if a.lower() != "debug=true"]
    guarded(lambda: _call(main, arguments), after_interrupt)


def _call(main: Callable[..., None], arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return print(main.__globals__["__doc__"])
    parameters = dict(inspect.signature(main).parameters)
    passes, rest = parameters.pop("overrides", None), []
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument} is not KEY=VALUE; --help shows the keys")
        if key not in parameters and passes:
            rest.append(argument)
            continue
        if key not in parameters:
            raise UserError(f"unknown key {key}; {nearest(key, list(parameters))}")
        kind = parameters[key].annotation
        try:
            values[key] = kind(value)
        except ValueError as error:
            raise UserError(f"{argument}: the value must be of type {kind.__name__}") from error
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in values:
            raise UserError(f"give {key}=…; --help shows the keys")
    main(*rest, **values)
