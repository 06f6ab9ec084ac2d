"""The tables of a sweep: a row per run, per group of seeds, per failure."""

import math
import os
from collections.abc import Sequence
from typing import Any

from mogrifier_lm.reports.folders import (
    Run,
    Runs,
    completed,
    evaluators,
    groups,
    mean_sd,
    overridden,
    span,
    swept,
)
from mogrifier_lm.runs.folder import Status

SHARED = " †"
"""Behind the speed of a run that had the machine not for itself."""


def _mean_sd(values: Sequence[float], digits: int = 2) -> str:
    texts = [f"{x:,.{digits}f}" for x in mean_sd(values) if not math.isnan(x)]
    return " ± ".join(texts)


def _names(runs: Sequence[Run]) -> dict[int, str]:
    """The folders as short as they can be told apart."""
    common = os.path.commonpath([run.folder.path.resolve().parent for run in runs])
    return {id(run): os.path.relpath(run.folder.path.resolve(), common) for run in runs}


def run_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per run, as in sweep.csv; a cell that is not known is empty."""
    names, rows = _names(runs), []
    for run in runs:
        row: dict[str, Any] = {key: run.value(key) for key in ("run", *overridden(runs))}
        row["run"] = names[id(run)]  # also where a folder that says nothing is told by its name
        row["seed"] = run.value("seed")
        row |= {key: run.summary.get(key, "") for key in ("params", "hidden_size")}
        row |= {"status": run.status, "error": run.summary.get("error", "")}
        for name in evaluators(runs):
            ppls = {f"{split}/{name}/ppl": run.ppl(split, name) for split in ("valid", "test")}
            row |= {key: "" if math.isnan(ppl) else ppl for key, ppl in ppls.items()}
        rows.append(row | {"tokens_per_second": run.summary.get("tokens_per_second", "")})
    if any(run.beside for run in runs):
        rows = [row | {"runs_beside": run.beside} for row, run in zip(rows, runs, strict=True)]
    return rows


def group_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per group: what it costs, and its perplexities over the seeds."""
    rows = []
    for key, group in groups(runs).items():
        row = dict(zip(swept(runs), key, strict=True))
        if "model.hidden_size" not in row:
            row["hidden size"] = span([run.summary["hidden_size"] for run in group])
        row["parameters"] = span([run.summary["params"] for run in group])
        speed = _mean_sd([run.summary["tokens_per_second"] for run in group], 0)
        row["tokens/s"] = speed + SHARED * any(run.beside for run in group)
        row["n"] = str(len(group))
        for name in evaluators(runs):
            for split in ("valid", "test"):
                row[f"{split}, {name}"] = _mean_sd([run.ppl(split, name) for run in group])
        rows.append(row)
    return rows


def failure_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per run that has not completed, with its reason."""
    shown = ("run", *swept(runs), "seed", "status", "error")
    rows = [row for row in run_table(runs) if row["status"] != Status.COMPLETED]
    return [{key: str(row[key]) for key in shown} for row in rows]


def headline(runs: Runs) -> str:
    """How the runs ended, and what they have in common."""
    statuses = [run.status for run in runs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    fixed = [f"{k}={runs[0].value(k)}" for k in overridden(runs) if k not in swept(runs)]
    text = f"{len(runs)} runs: {counts}. " + (f"All with {' '.join(fixed)}. " if fixed else "")
    floors = {run.summary["valid"].get("floor_ppl", math.nan) for run in completed(runs)}
    if len(floors) == 1 and not math.isnan(floor := floors.pop()):
        text += f"The validation perplexity of the source itself is {floor:.2f}. "
    if any(run.beside for run in completed(runs)):
        text += f"Tokens/s{SHARED}: other runs were at work on the machine meanwhile. "
    if runs.study:
        return text + "Perplexity per word, the best on validation text first."
    return text + "Perplexity per word: mean ± sample standard deviation over n seeds."
