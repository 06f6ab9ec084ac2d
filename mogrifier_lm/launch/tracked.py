"""A run as its tracker shows it: opened once the model stands; curves and a table at the end.

Imports here are light: torch, matplotlib and wandb come in when a run needs them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mogrifier_lm.config import Config
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.reports.table import final_table, objective
from mogrifier_lm.runs.folder import RunFolder, sweep_name
from mogrifier_lm.terminal import shown

if TYPE_CHECKING:
    from mogrifier_lm.tracking.tracker import Tracker

log = logging.getLogger(__name__)


def tracked_run(config: Config, folder: RunFolder, overrides: Sequence[str]) -> float:
    """A run, shown where its tracker says and, once it has ended, drawn and printed."""
    from mogrifier_lm.reports.plots import plot_curves
    from mogrifier_lm.runs.run import run

    opened: list[Tracker] = []
    with ExitStack() as stack:

        def open_tracker(values: Mapping[str, Any]) -> Callable[[Mapping[str, float]], None]:
            tracker = _open_tracker(config, folder, overrides, values)
            opened.append(stack.enter_context(tracker))
            return tracker.log

        summary = run(config, folder, open_tracker)
        (tracker,) = opened
        curves = plot_curves(folder)
        tracker.summary(summary)
        if curves:
            tracker.log_image("curves", curves)
        if config.tracker.artifacts:
            tracker.log_model(folder.path, folder.model_files(), summary)
    log.info("%s", final_table(summary, shown(folder.path)))
    return objective(summary)


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
    sweep = folder.sweep()
    tracker = build_tracker(
        kind=t.name,
        mode=t.mode,
        project=t.project,
        entity=t.entity,
        folder=folder.path,
        config={**values, "overrides": list(overrides)},
        group=t.group or (sweep_name(sweep) if sweep else None),
        name=t.run_name or short_name(overrides) or folder.path.name,
        tags=list(dict.fromkeys([*t.tags, *(name[:64] for name in names)])),
        run_id=run_id,
        rows=folder.rows() if run_id else (),
    )
    if tracker.run_id:
        write_json(folder.wandb, {"run_id": tracker.run_id})
    return tracker


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
