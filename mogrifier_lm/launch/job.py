"""A run as a command starts it, alone, in a sweep or under torchrun: its folder and its fate.

Imports here are light: torch, datasets and wandb come in when a run needs them.
"""

import functools
import logging
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mogrifier_lm.config import (
    CONFIG_DIR,
    Config,
    load_config,
    portable,
    save_config,
    validate,
)
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.launch.explain import EXPECTED, explain
from mogrifier_lm.launch.overrides import (
    as_chosen,
    as_meant,
    as_values,
    check_grid,
    resume_config,
    without_effect,
)
from mogrifier_lm.launch.signals import Interrupted, end_by, endable
from mogrifier_lm.launch.sweep_report import report_sweep
from mogrifier_lm.launch.tracked import get_text, tracked_run
from mogrifier_lm.machine import PROCESSES, RANK
from mogrifier_lm.reports.table import objective
from mogrifier_lm.runs.folder import (
    RunFolder,
    Status,
    check_inside,
    locked,
)
from mogrifier_lm.terminal import shown

log = logging.getLogger(__name__)


@functools.cache
def run_dir(resume: str | None) -> str:
    """The folder of a run: that of the run to resume, else a new one named by date and time."""
    if PROCESSES == 1:
        return _claim(resume)
    from mogrifier_lm.training.parallel import Processes

    return Processes().first(lambda: _claim(resume))


def _claim(resume: str | None) -> str:
    """The folder of `run_dir`.

    A folder is claimed by making it, so that two runs that start in one second do not share it.
    """
    if resume:
        folder = RunFolder(resume)
        if not folder.has_begun():
            raise UserError(f"resume={resume}: no {folder.config.name} there, so it is no run's")
        check_inside(folder.path)
        if not os.access(resume, os.W_OK):
            raise UserError(f"resume={resume} cannot be written to: take a copy of it")
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


def job_dir(sweep_dir: str, num: int, overrides: Sequence[str]) -> str:
    """The folder, inside its sweep's, of the job with these overrides.

    It is the one that an earlier part of the sweep has begun with them, so that the same command,
    or one with more values, goes on with what is there; else `num`, or the next without a run.
    """
    wanted = as_values(overrides)
    with locked(Path(sweep_dir), wait=True):  # others may choose at this moment
        for folder in map(RunFolder, Path(sweep_dir).glob("*/")):
            try:
                if folder.overrides.is_file() and read_json(folder.overrides, {str: str}) == wanted:
                    return folder.path.name
            except UserError as error:  # of this run alone: the others go on
                log.warning("%s: the run there is left as it is", error)
        while (folder := RunFolder(Path(sweep_dir, str(num)))).is_run():
            num += 1
        folder.path.mkdir(exist_ok=True)
        write_json(folder.overrides, wanted)
        return str(num)


def groups() -> dict[str, list[str]]:
    """Group → options; not Hydra's own."""
    options: dict[str, list[str]] = {}
    for path in sorted(CONFIG_DIR.glob("*/**/*.yaml")):
        group = path.parent.relative_to(CONFIG_DIR)
        if group.parts[0] != "hydra":
            options.setdefault(group.as_posix(), []).append(path.stem)
    return dict(sorted(options.items()))


def config_groups() -> str:
    """What --help lists."""
    return "\n".join(f"{group}: {', '.join(options)}" for group, options in groups().items())


def check_command(arguments: Sequence[str]) -> None:
    """What Hydra would not say in words, or do before we are asked.

    Raises:
        UserError: a group that is given something other than names of its options; the folder of
            a sweep that leads elsewhere.
    """
    known = groups()
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key == "hydra.sweep.dir":
            check_inside(Path(text.strip("\"'")))
        if key.lstrip("+") not in known:
            continue
        value: Any = OverridesParser.create().parse_override(argument).value()
        names = value.list if isinstance(value, ChoiceSweep) else [value]
        names = [n for part in names for n in (part if isinstance(part, list) else [part])]
        if not all(isinstance(name, str | QuotedString) for name in names):
            raise UserError(f"{argument}: {key} takes names: {', '.join(known[key.lstrip('+')])}")


def register() -> None:
    """Tell Hydra the schema, how the folder of a run is named, and what --help lists."""
    ConfigStore.instance().store("schema", node=Config)
    # Cached, the folder of a sweep is that of the first process in those of a launcher, too.
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)
    OmegaConf.register_new_resolver("config_groups", config_groups, replace=True)


register()  # on import, as a launcher's processes have nothing of ours but `train_job`


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config that `python train.py OVERRIDES` would run with, not yet validated."""
    return _composed(overrides)[0]


def _composed(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The config of a command, and Hydra's own."""
    check_command(overrides)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        node = hydra.compose(
            "config", overrides=[as_meant(o) for o in overrides], return_hydra_config=True
        )
    with open_dict(node):
        own = node.pop("hydra")
    as_chosen(node, own.runtime.choices, overrides)
    return node, own


def check_run(arguments: Sequence[str]) -> None:
    """Refuse a command, and a run that begins as `validate` does, before it has a folder."""
    check_command(arguments)
    parser = OverridesParser.create()
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    check_grid(map(parser.parse_override, given))
    if any(argument.startswith("-") for argument in arguments):
        return
    single = [a for a in arguments if not parser.parse_override(a).is_sweep_override()]
    node, own = _composed(single)
    if own.mode != RunMode.MULTIRUN and not node.resume:
        validate(node if single == list(arguments) else compose(arguments))


def kept_by_recipe(node: DictConfig, overrides: Sequence[str]) -> list[str]:
    """What a recipe says in the place of a group that is chosen beside it, a line for each."""
    given, lines = as_values(overrides), []
    if groups := given.keys() & {"model", "regularization", "optimizer", "trainer"}:
        if recipe := given.pop("experiment", None):
            plain = hydra.compose("config", overrides=[f"{k}={v}" for k, v in given.items()])
            for group in sorted(groups):
                kept = [f"{k}={v}" for k, v in node[group].items() if v != plain[group][k]]
                if kept:
                    lines.append(
                        f"{group}={given[group]}: {', '.join(kept)} stay as experiment={recipe} "
                        f"has them; {group}.KEY=VALUE changes them"
                    )
    return lines


def compose_grid(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Key → values of the grid that `python train.py OVERRIDES` sweeps; {} where it is no sweep."""
    params = _composed(overrides)[1].sweeper.get("params") or {}
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    return {o.get_key_element(): list(o.sweep_string_iterator()) for o in parsed}


def train_job(node: DictConfig) -> float:
    """What Hydra calls: one run, alone or of a sweep; returns its objective.

    A signal that ends the run ends this process.
    """
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    logging.raiseExceptions = False  # a full disk is told once, by the run
    try:
        with endable():
            return _job(node, folder)
    except Interrupted as error:
        begun = folder.has_begun()
        then = "resume= goes on" if begun else "it had not begun: give the command again"
        print(f"interrupted: {folder} {error}; {then}", file=sys.stderr)
        end_by(error.number)


def _job(node: DictConfig, folder: RunFolder) -> float:
    """A run, and the report of the sweep that it is of."""
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    as_chosen(node, hydra_config.runtime.choices, overrides)
    if hydra_config.mode is None or hydra_config.mode.name != "MULTIRUN":
        if RANK:
            return _follow(node, folder, overrides)
        try:
            with folder.locked():
                return run_in(node, folder, overrides)
        except EXPECTED as error:
            if node.debug:
                raise
            # Raised as it is Hydra would say first that a job has failed.
            raise SystemExit(f"error: {explain(error)}") from None
        finally:
            if sweep := folder.sweep():  # a run of a sweep goes on alone
                report_sweep(sweep)
    if PROCESSES > 1:
        raise UserError("torchrun is for one run; a sweep is started without it")
    if "basic" not in hydra_config.launcher._target_:
        _among_others(hydra_config.job.num)
    try:
        with folder.locked():
            return run_in(node, folder, overrides, in_sweep=True)
    except Exception as error:
        reason = explain(error) or type(error).__name__
    finally:
        report_sweep(folder.path.parent)
    # A new error: Hydra keeps it to the end of the sweep, and the old one's frames hold the model.
    raise UserError(f"{folder}: {reason}")


def _among_others(num: int) -> None:
    """Lines of runs that share a terminal begin with the run's number; there are no bars."""
    os.environ["TQDM_DISABLE"] = "1"
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter(f"[{num}] %(message)s"))


def _follow(node: DictConfig, folder: RunFolder, overrides: Sequence[str]) -> float:
    """The part in a run of a process that torchrun started beside the first."""
    config = resume_config(node, folder.config, overrides) if node.resume else validate(node)
    from mogrifier_lm.runs.run import run

    get_text(config)
    run(config, folder)
    return math.nan  # the first process speaks for all


def run_in(
    node: DictConfig, folder: RunFolder, overrides: Sequence[str], in_sweep: bool = False
) -> float:
    """Run a config in its folder, or what is left of it there; a failure leaves its reason."""
    holds_run, completed, begun = folder.has_trained(), folder.is_completed(), False
    try:
        if in_sweep and node.resume:
            raise UserError(
                f"resume={node.resume} goes on with one run; a sweep goes on by its own command "
                "with hydra.sweep.dir=DIR"
            )
        if holds_run and not (node.resume or in_sweep):
            raise UserError(f"{folder} holds a run already: resume={folder}, or another folder")
        if not (holds_run or node.resume):
            write_json(folder.overrides, as_values(overrides))
        if holds_run and not folder.can_resume() and not (in_sweep and completed):
            raise UserError(
                f"{folder} holds results, but no checkpoint to go on from: take another folder"
            )
        config = resume_config(node, folder.config, overrides) if node.resume else validate(node)
        if in_sweep and folder.has_begun():
            saved, t = load_config(folder.config), config.trainer
            on = replace(t, device=saved.trainer.device)  # which may be another one
            if saved != portable(replace(config, trainer=on)):
                raise UserError(
                    f"{folder} holds a run of these overrides with another {folder.config.name}: "
                    "take another hydra.sweep.dir"
                )
            if completed:
                log.info("%s is completed: skipped", folder)
                return objective(folder.read_summary())
        for key in without_effect(config, overrides):
            log.warning("%s has no effect beside the other settings", key)
        for line in kept_by_recipe(node, overrides):
            log.warning("%s", line)
        # Written before torch is imported: from here on a run that is killed can be resumed.
        save_config(config, folder.config)
        begun = True
        if not completed:  # its results stay until there are better ones
            folder.summary.unlink(missing_ok=True)  # of the part that failed
        return tracked_run(config, folder, overrides)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit | Interrupted)
        status = Status.INTERRUPTED if interrupted else Status.FAILED
        reason = explain(error) or type(error).__name__
        if isinstance(error, SystemExit):  # raised by submitit, when SLURM sends its signal
            reason = "at its time limit or preempted; it goes on when the queue starts it again"
        if in_sweep:  # alone it ends with these words
            log.error("run %s: %s", status, reason)
        with suppress(UserError, OSError):  # where the disk is full the error has said so
            # A command that is refused leaves the run that is there alone.
            if not completed and (begun or not holds_run):
                folder.end(status, reason, seed=node.seed)
            with open(folder.log, "a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
                file.write(f"run {status}: {reason}\n" * (not in_sweep))
        if isinstance(error, KeyboardInterrupt) and begun:
            typed = (
                f"hydra.sweep.dir={shown(folder.path.parent)}" if in_sweep else f"resume={folder}"
            )
            command = "the same command with" if in_sweep else "python train.py"
            raise KeyboardInterrupt(f"{command} {shlex.quote(typed)} goes on") from error
        raise
