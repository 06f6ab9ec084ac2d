"""A run as its tracker shows it: opened once the model stands; curves and a table at the end.

Imports here are light: torch, matplotlib and wandb come in when a run needs them.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mogrifier_lm.config import Config
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.launch import provenance
from mogrifier_lm.reports.table import final_table, objective
from mogrifier_lm.runs.folder import RunFolder, sweep_name
from mogrifier_lm.terminal import shown

if TYPE_CHECKING:
    from mogrifier_lm.tracking.tracker import Tracker

log = logging.getLogger(__name__)

TESTED_TORCH = (2, 11), (2, 13)
LONGEST_NAME, LONGEST_TAG = 128, 64
"""Characters that the server of W&B takes."""


def tracked_run(config: Config, folder: RunFolder, overrides: Sequence[str]) -> float:
    """A run, shown where its tracker says and, once it has ended, drawn and printed."""
    from mogrifier_lm.reports.plots import plot_curves
    from mogrifier_lm.runs.run import run

    warn_of_torch(version("torch"))
    opened: list[Tracker] = []
    with ExitStack() as stack:

        def open_tracker(values: Mapping[str, Any]) -> Callable[[Mapping[str, float]], None]:
            tracker = _open_tracker(config, folder, overrides, values)
            opened.append(stack.enter_context(tracker))
            return tracker.log

        summary = run(config, folder, open_tracker, provenance.collect)
        (tracker,) = opened
        curves = plot_curves(folder)
        tracker.summary(summary)
        if curves:
            tracker.log_image("curves", curves)
        if config.tracker.artifacts:
            tracker.log_model(folder.path, folder.model_files(), summary)
    log.info("%s", final_table(summary, shown(folder.path)))
    return objective(summary)


def warn_of_torch(found: str) -> None:
    """Say where a version of torch is outside the range that was tested."""
    first, last = TESTED_TORCH
    if not first <= tuple(map(int, found.split(".")[:2])) <= last:
        span = " to ".join(".".join(map(str, numbers)) for numbers in TESTED_TORCH)
        log.warning("torch %s was not tested, %s were", found, span)


def _open_tracker(
    config: Config, folder: RunFolder, overrides: Sequence[str], values: Mapping[str, Any]
) -> "Tracker":
    from mogrifier_lm.tracking.tracker import build_tracker
    from mogrifier_lm.training import checkpoint

    t = config.tracker
    if begun := read_json(folder.overrides):  # a run that goes on keeps its name
        overrides = [f"{k}={v}" for k, v in begun.items()]
    chosen = dict(o.split("=", 1) for o in overrides if o.startswith(("experiment=", "sweep=")))
    names = [*chosen.values(), config.data.name, config.model.cell]
    names += ["mogrifier"] if config.model.rounds else []
    run_id = read_json(folder.wandb).get("run_id")
    if not run_id and folder.last.is_file():  # where older versions kept it
        run_id = checkpoint.load(folder.last)[1]["progress"].get("run_id")
    # Cut at its beginning: what is swept stands at the end.
    name = _wished("name", t.run_name, overrides) or short_name(overrides) or folder.path.name
    sweep = folder.sweep()
    given_tags = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    tracker = build_tracker(
        kind=t.name,
        mode=t.mode,
        project=_wished("project", t.project, overrides) or t.project,
        entity=t.entity,
        folder=folder.path,
        config={**values, "overrides": list(overrides)},
        group=t.group or (sweep_name(sweep) if sweep else None),
        name=name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}",
        tags=list(dict.fromkeys(tag[:LONGEST_TAG] for tag in (*t.tags, *given_tags, *names))),
        run_id=run_id,
        rows=folder.rows() if run_id else (),
    )
    if tracker.run_id:
        write_json(folder.wandb, {"run_id": tracker.run_id})
    return tracker


def _wished(what: str, value: str | None, overrides: Sequence[str]) -> str | None:
    """What W&B's own variable says, WANDB_PROJECT say, unless the command line has an override."""
    key = {"name": "tracker.run_name"}.get(what, f"tracker.{what}")
    if any(override.startswith(f"{key}=") for override in overrides):
        return value
    return os.environ.get(f"WANDB_{what.upper()}") or value


def short_name(overrides: Sequence[str]) -> str:
    """What tells a run from others: rounds=3,seed=1 of model.rounds=3 and seed=1.

    A key keeps its whole path where its last part alone would be another key's too.
    """
    skipped = ("tracker", "sweep=", "data.dir=", "data.cache_dir=")
    pairs = [o.lstrip("+").split("=", 1) for o in overrides if not o.startswith(skipped)]
    last = [pair[0].rpartition(".")[2] for pair in pairs]
    return ",".join(
        "=".join([key if last.count(short) > 1 else short, *value])
        for short, (key, *value) in zip(last, pairs, strict=True)
    )
