"""A run as its tracker shows it: opened once the model stands; curves and a table at the end.

Imports here are light: torch, matplotlib and wandb come in when a run needs them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

from mogrifier_lm.config import Config
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.launch import provenance
from mogrifier_lm.machine import PROCESSES
from mogrifier_lm.reports.table import final_table, objective
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.terminal import shown

if TYPE_CHECKING:
    from mogrifier_lm.data import Tokenizer
    from mogrifier_lm.model import LanguageModel
    from mogrifier_lm.tracking.tracker import Tracker

log = logging.getLogger(__name__)

TESTED_TORCH = (2, 11), (2, 13)
SAMPLED = 40
"""Tokens of each text that `tracker.samples` asks for."""


def tracked_run(config: Config, folder: RunFolder, overrides: Sequence[str]) -> float:
    """A run, shown where its tracker says and, once it has ended, drawn and printed.

    Args:
        config: validated.
        folder: of the run, the config in it.
        overrides: of the command line, which name the run.

    Returns:
        Its objective, see `reports.table.objective`.

    Raises:
        UserError: something that the user can mend.
    """
    from mogrifier_lm.reports.plots import plot_curves
    from mogrifier_lm.runs.run import run

    warn_of_torch(version("torch"))
    opened: list[Tracker] = []
    with ExitStack() as stack:

        def open_tracker(
            values: Mapping[str, Any], model: "LanguageModel", tokenizer: "Tokenizer"
        ) -> Callable[[Mapping[str, float]], None]:
            tracker = _open_tracker(config, folder, overrides, values)
            opened.append(stack.enter_context(tracker))

            def track(row: Mapping[str, float]) -> None:
                is_new = tracker.log(row)
                if is_new and config.tracker.samples and "valid/ppl" in row:
                    texts = sampled(model, tokenizer, config.tracker.samples)
                    rows = [{"step": row["step"], "text": text} for text in texts]
                    tracker.log_table("samples", rows)

            return track

        get_text(config)
        summary = run(config, folder, open_tracker, provenance.collect)
        (tracker,) = opened
        curves, *_ = [plot_curves(folder, kind) for kind in ("png", *config.report.formats)]
        tracker.summary(summary)
        if curves:
            tracker.log_image("curves", curves)
        if config.tracker.artifacts:
            tracker.log_model(folder.path, folder.model_files(), summary)
    log.info("%s", final_table(summary, shown(folder.path)))
    return objective(summary)


def sampled(model: "LanguageModel", tokenizer: "Tokenizer", number: int) -> list[str]:
    """Texts that a model writes with the weights that it has; always by the same draws.

    Args:
        model: left as it is.
        tokenizer: of the model.
        number: of texts.

    Returns:
        The texts, or the one reason why it writes none.
    """
    from mogrifier_lm.data import UNK
    from mogrifier_lm.inference.generate import Sampling, sample

    how = Sampling(banned=[tokenizer.index[UNK]] if UNK in tokenizer.index else [])
    try:
        drawn = list(islice(sample(model, [], number, tokenizer.eos_id, how), SAMPLED))
    except UserError as error:
        return [str(error)]
    return [tokenizer.decode(list(text)) for text in zip(*drawn, strict=True)]


def get_text(config: Config) -> None:
    """Fetch the text of a run; its other processes go after the first, whose cache they may share.

    To be called in each of them.
    """
    from mogrifier_lm.texts.fetch import fetch

    if PROCESSES == 1:
        return fetch(config.data)
    from mogrifier_lm.training.parallel import Processes

    Processes().in_turn(lambda: fetch(config.data))


def warn_of_torch(found: str) -> None:
    """Say where a version of torch is outside the range that was tested."""
    first, last = TESTED_TORCH
    if not first <= tuple(map(int, found.split(".")[:2])) <= last:
        span = " to ".join(".".join(map(str, numbers)) for numbers in TESTED_TORCH)
        log.warning("torch %s was not tested, %s were", found, span)


def _open_tracker(
    config: Config, folder: RunFolder, overrides: Sequence[str], values: Mapping[str, Any]
) -> "Tracker":
    from mogrifier_lm.tracking.names import cut, short_name, sweep_name, tags, wished
    from mogrifier_lm.tracking.tracker import build_tracker
    from mogrifier_lm.training import checkpoint

    t = config.tracker
    if begun := read_json(folder.overrides, {str: str}):  # a run that goes on keeps its name
        overrides = [f"{k}={v}" for k, v in begun.items()]
    chosen = dict(o.split("=", 1) for o in overrides if o.startswith(("experiment=", "sweep=")))
    names = [*chosen.values(), config.data.name, config.model.cell]
    names += ["mogrifier"] if config.model.rounds else []
    run_id = read_json(folder.wandb, {"run_id": str}).get("run_id")
    if not run_id and folder.last.is_file():  # where older versions kept it
        run_id = checkpoint.load(folder.last)[1]["progress"].get("run_id")
    name = wished("WANDB_NAME", "tracker.run_name", t.run_name, overrides)
    group = t.group or (sweep_name(sweep) if (sweep := folder.sweep()) else None)
    known = folder.read_provenance()
    facts = {key: value for key, value in known.items() if key not in ("before", "command")}
    facts["git"] = {k: v for k, v in (known.get("git") or {}).items() if k != "diff"}
    tracker = build_tracker(
        kind=t.name,
        mode=t.mode,
        project=wished("WANDB_PROJECT", "tracker.project", t.project, overrides) or t.project,
        entity=t.entity,
        folder=folder.path,
        config={**values, "overrides": list(overrides), "provenance": facts},
        group=cut(group) if group else None,
        name=cut(name or short_name(overrides) or folder.path.name),
        tags=tags(t.tags, overrides, names),
        run_id=run_id,
        rows=folder.rows() if run_id else (),
    )
    if tracker.run_id:
        write_json(folder.wandb, {"run_id": tracker.run_id})
    return tracker
