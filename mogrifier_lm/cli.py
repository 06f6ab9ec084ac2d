"""Command lines: compose the config, check it, run it, and say what is wrong in one line.

Imports here are light: torch, datasets and wandb come in when a run needs them.
"""

import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mogrifier_lm.config import (
    SCHEMAS,
    Config,
    nearest,
    resume_config,
    save_config,
    unknown_key,
    validate,
    write_json,
)
from mogrifier_lm.errors import UserError

log = logging.getLogger(__name__)

# Errors that the user can mend; OSError is a file or folder that cannot be read or written.
EXPECTED = (UserError, HydraException, OmegaConfBaseException, OSError)

# Beside the package in a checkout, inside it in a wheel.
_HERE = Path(__file__).resolve().parent
CONFIG_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


@functools.cache
def run_dir(resume: str | None) -> str:
    """The folder of a run: that of the run to resume, else a new one named by date and time.

    A folder is claimed by making it, so that two runs that start in one second do not share it.
    """
    if resume:
        if not (Path(resume) / "config.yaml").is_file():
            raise UserError(f"resume={resume}: no config.yaml there, so it is not a run's folder")
        return resume
    base = Path("runs", time.strftime("%Y-%m-%d"), time.strftime("%H-%M-%S"))
    candidate, n = base, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return str(candidate)
        except FileExistsError:
            n += 1
            candidate = base.with_name(f"{base.name}_{n}")
        except OSError as error:
            raise UserError(f"{candidate} cannot be made: {error.strerror}") from error


def register() -> None:
    """Tell Hydra the schema, and how the folder of a run is named."""
    ConfigStore.instance().store("schema", node=Config)
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)


def explain(error: BaseException) -> str:
    """One line for an error that the user can mend: the first cause that says something."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    text = "\n".join(str(cause) for cause in chain)
    path = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown and unknown[2] in SCHEMAS:
        return str(unknown_key(path[1] if path else unknown[1], SCHEMAS[unknown[2]]))
    scalar = re.search(r"Error merging override (\S+)=(\S+)", text)
    if scalar and "is not a ListConfig" in text:
        return f"{scalar[1]} takes a list: {scalar[1]}=[{scalar[2]}]"
    value = re.search(r"Value '.*", text)
    if value and path:
        return f"{path[1]}: {value[0]}"
    wanted = re.search(r"Could not find '(\w+)/([^']*)'\s+Available options in '\w+':\s+", text)
    if wanted:
        group, rest = wanted[1], text[wanted.end() :]
        options = re.findall(r"^\s*(\S+)$", rest.split("Config search path")[0], re.MULTILINE)
        return f"no {group}={wanted[2]}; {nearest(wanted[2], options)}"
    missing = re.search(r"Could not load '(\w+)/([^']*)'", text)  # in a list of options
    if missing:
        options = sorted(path.stem for path in (CONFIG_DIR / missing[1]).glob("*.yaml"))
        return f"no {missing[1]}={missing[2]}; {nearest(missing[2], options)}"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def guarded(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Run an entry point; the user's errors become one line and exit code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on and leaves the words to us
    try:
        main()
    except EXPECTED as error:
        if "debug=true" in (argument.lower() for argument in sys.argv):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted{after_interrupt}", file=sys.stderr)
        sys.exit(130)


def train() -> None:
    """The command `python train.py`."""
    register()
    guarded(
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(_train),
        "; resume=RUN_DIR goes on from the last checkpoint",
    )


def _train(node: DictConfig) -> float:
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    multirun = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    holds_run, begun = (folder / "checkpoints").exists(), False
    try:
        if holds_run and not node.resume:
            raise UserError(
                f"{folder} holds a run already: resume={folder}, or take another folder"
            )
        config = resume_config(node, folder, overrides) if node.resume else validate(node)
        # Written before torch is imported: from here on a run that is killed can be resumed.
        save_config(config, folder)
        begun = True
        from mogrifier_lm.run import run

        return run(config, folder, overrides, sweep=folder.parent.name if multirun else None)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed"
        reason = explain(error) or type(error).__name__
        if begun or not holds_run:  # a command that is refused leaves the run that is there alone
            failure = {"status": status, "error": reason, "seed": node.seed}
            write_json(folder / "summary.json", failure)
        if interrupted or isinstance(error, EXPECTED):
            log.error("run %s: %s", status, reason)
        else:
            log.exception("run failed")
        raise


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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    register()
    guarded(_evaluate)


def _evaluate() -> None:
    own = [a for a in sys.argv[1:] if a.startswith(("run=", "compare="))]
    overrides = [a for a in sys.argv[1:] if a not in own]
    if len(own) != 1:
        raise UserError("give either run=RUN_DIR or compare=[RUN_A,RUN_B]")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        node = hydra.compose("config", overrides=overrides)

    def load(folder: Any) -> tuple[Config, Path]:
        return resume_config(node, Path(str(folder)), overrides, SCORABLE), Path(str(folder))

    if own[0].startswith("run="):
        config, folder = load(own[0].removeprefix("run="))
        from mogrifier_lm.evaluate import evaluate_run

        evaluate_run(config, folder)
        return
    sides = OmegaConf.to_container(OmegaConf.from_dotlist(own))["compare"]  # type: ignore[index, call-overload]
    if not isinstance(sides, list) or len(sides) != 2:
        raise UserError(f"{own[0]}: compare=[RUN_A,RUN_B] takes two runs, or two lists of runs")
    runs = [[load(f) for f in (side if isinstance(side, list) else [side])] for side in sides]
    from mogrifier_lm.evaluate import compare_runs

    compare_runs(runs)
