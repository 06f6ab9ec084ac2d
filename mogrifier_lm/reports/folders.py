"""What the folders of runs say: read, grouped, and how far a sweep is.

What is read: its overrides (what tells a run from the others; where there are none, its folder's
name does), its summary (how it ended) and its provenance (its data). A run without a summary is
unfinished: it is running, or was cut.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mogrifier_lm.config import read_yaml
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json
from mogrifier_lm.reports.table import LIMIT, shown_ppl
from mogrifier_lm.runs.folder import MULTIRUN, RunFolder, Status

# Overrides that summary.json tells of where a run was begun without them.
TOLD = {"model.rounds": "rounds", "model.hidden_size": "hidden_size", "seed": "seed"}
STUDY = "study.log"  # in the folder of a search


@dataclass(kw_only=True)
class Run:
    """What a run's folder says."""

    folder: RunFolder
    overrides: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    ended: float = 0.0  # seconds since 1970
    at_work: tuple[float, float] = (math.inf, math.inf)  # from, to; of its last part
    beside: int = 0  # other runs of its folder that were at work on the machine meanwhile

    @property
    def status(self) -> str:
        return str(self.summary.get("status", Status.UNFINISHED))

    def value(self, key: str) -> str:
        """The value of an override; "" where the folder does not say."""
        return self.overrides.get(key, str(self.summary.get(TOLD.get(key, ""), "")))

    def ppl(self, split: str, evaluator: str) -> float:
        """Perplexity; nan where there is none."""
        return shown_ppl(self.summary.get(split, {}).get(evaluator, {}))


class Runs(list[Run]):
    """The runs that a report is of."""

    @functools.cached_property
    def study(self) -> Path | None:
        """The study that they are the trials of; None where they are not those of one search."""
        folders = {run.folder.path.resolve().parent for run in self}
        path = min(folders) / STUDY
        return path if len(folders) == 1 and path.is_file() else None


def read_runs(folders: Sequence[Path]) -> Runs:
    """The runs of folders, each of which is a sweep's or a run's.

    Raises:
        UserError: a folder that is neither.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        inside = sorted(folder.glob("*/"), key=lambda path: _order([path.name]))
        alone = RunFolder(folder)
        places = [alone] if alone.is_run() else [RunFolder(path) for path in inside]
        found = [place for place in places if place.is_run()]
        if not found:
            raise UserError(f"{folder} is the folder neither of a run nor of a sweep")
        read = [_read(place) for place in found]
        if not _is_on_a_cluster(folder):
            for run in read:
                (begins, ends), others = run.at_work, (r.at_work for r in read if r is not run)
                # By more than a second, to which starts are known.
                run.beside = sum(start + 1 < ends and begins + 1 < end for start, end in others)
        runs |= {run.folder.path.resolve(): run for run in read}
    return Runs(runs.values())


def _read(folder: RunFolder) -> Run:
    """What a folder says; one whose summary or provenance is damaged is a run that failed."""
    run = Run(folder=folder, overrides={"run": folder.path.name})
    with suppress(UserError):
        run.overrides = read_json(folder.overrides, {str: str}) or run.overrides
    try:
        run.summary = folder.read_summary()
        facts = folder.read_provenance()
        run.data = facts.get("data", {}).get("name")
        run.ended = folder.summary.stat().st_mtime if run.summary else 0.0
        with suppress(KeyError, TypeError, ValueError):
            run.at_work = _at_work(folder, facts, run.summary)
    except UserError as error:
        run.summary = {"status": Status.FAILED, "error": str(error)}
    return run


def _at_work(
    folder: RunFolder, facts: Mapping[str, Any], summary: Mapping[str, Any]
) -> tuple[float, float]:
    """From when to when a run, its last part, has trained (train.log grows when it is skipped)."""
    began = datetime.fromisoformat(facts["started"]).timestamp()
    took = 0.0 if "before" in facts else summary["seconds"]
    with suppress(OSError):  # as files of a copy these are of one moment, or nearly
        first, last = folder.config.stat().st_mtime, folder.metrics.stat().st_mtime
        if last - first > took:
            return first, last
    return began, began + took


def _is_on_a_cluster(folder: Path) -> bool:
    """Whether the runs of a sweep were launched on several machines, for all that is known."""
    try:
        launcher = read_yaml(folder / MULTIRUN)["hydra"]["launcher"]["_target_"]
    except (UserError, OSError, LookupError, TypeError):
        return False
    return "submitit" in launcher or "ray" in launcher


def completed(runs: Sequence[Run]) -> list[Run]:
    """The runs that have their results."""
    return [run for run in runs if run.status == Status.COMPLETED]


def evaluators(runs: Sequence[Run]) -> list[str]:
    """The names of the evaluators that scored a run, in order."""
    scores = [score for run in completed(runs) for score in run.summary["valid"].items()]
    return list(dict.fromkeys(name for name, score in scores if isinstance(score, Mapping)))


def overridden(runs: Sequence[Run]) -> list[str]:
    """The keys that some run was started with, in their order; not the seed."""
    return list(dict.fromkeys(key for run in runs for key in run.overrides if key != "seed"))


def swept(runs: Sequence[Run]) -> list[str]:
    """The overrides, but for the seed, that differ between runs."""
    return [key for key in overridden(runs) if len({run.value(key) for run in runs}) > 1]


def number(text: str) -> float:
    """Infinity for what is not one, or none that a plot can take."""
    try:
        return value if abs(value := float(text)) < LIMIT else math.inf
    except ValueError:
        return math.inf


def _order(key: Sequence[str]) -> list[tuple[float, str]]:
    """To sort by: 10 after 9, words after numbers."""
    return [(number(text), text) for text in key]


def groups(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    """Values of the swept keys → the completed runs that have them and differ in the seed only."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in completed(runs):
        found.setdefault(tuple(run.value(key) for key in swept(runs)), []).append(run)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of the numbers that are known; nan where there is none."""
    known = [value for value in values if abs(value) < LIMIT]
    return fmean(known) if known else math.nan, stdev(known) if len(known) > 1 else math.nan


def span(values: Sequence[float]) -> str:
    """One number, or the least and the largest."""
    return "–".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def ended(runs: Sequence[Run], grid: Sequence[Mapping[str, str]], began: float) -> bool:
    """Whether every run of `grid` is completed, or has failed since the command began.

    Args:
        runs, grid, began: as for `progress`.
    """
    over = {
        frozenset(run.overrides.items())
        for run in runs
        if run.status == Status.COMPLETED or run.status == Status.FAILED and run.ended >= began
    }
    return bool(grid) and all(frozenset(job.items()) in over for job in grid)


def progress(runs: Sequence[Run], grid: Sequence[Mapping[str, str]], began: float) -> str:
    """How far a sweep is, in one line.

    Args:
        runs: of its folder.
        grid: the overrides of every run that its command asks for; empty where that is not known.
        began: when the command did, seconds since 1970; the time left is told by runs ended since.
    """
    status = {frozenset(run.overrides.items()): run.status for run in runs}
    asked = [status.get(frozenset(job.items())) for job in grid] or [run.status for run in runs]
    done, failed = asked.count(Status.COMPLETED), asked.count(Status.FAILED)
    left = len(asked) - done - failed
    text = f"{done} of {len(asked)} runs done, {failed} failed, {left} left"
    fresh = sum(run.ended > began for run in completed(runs))
    if fresh and left:
        text += f", {about((time.time() - began) / fresh * left)}"
    return text


def about(seconds: float) -> str:
    """A time for people, in minutes or seconds."""
    return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
