"""The report of a sweep: sweep.csv, sweep.md and sweep.png, from the files that its runs left.

Of a search, whose folder holds its study, the runs are trials: see reports/trials.py.
"""

import csv
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from mogrifier_lm.files import replacing, write_whole
from mogrifier_lm.reports.folders import Runs, evaluators, number
from mogrifier_lm.reports.plots import can_plot
from mogrifier_lm.reports.sweep import failure_table, group_table, headline, run_table
from mogrifier_lm.reports.sweep_plots import plot_sweep
from mogrifier_lm.reports.table import markdown_table, markdown_text
from mogrifier_lm.reports.trials import (
    importance_table,
    plot_importances,
    plot_trials,
    trial_table,
    why_no_importances,
)
from mogrifier_lm.terminal import plain


def markdown(runs: Runs, plots: bool = True) -> str:
    """What sweep.md holds.

    Args:
        runs: of the sweep or search.
        plots: whether the images that it shows are drawn.
    """
    search = runs.study is not None
    table = trial_table(runs) if search else group_table(runs)
    text = f"# {'Search' if search else 'Sweep'}\n\n{markdown_text(headline(runs))}\n\n"
    text += markdown_table(table) or "No run has completed.\n"
    text += "\n![](sweep.png)\n" if plots and evaluators(runs) else ""
    if search:
        reason = why_no_importances(runs)
        shares = markdown_table(importance_table(runs)) + (
            "\n![](importance.png)\n" if plots else ""
        )
        text += f"\n## Importance\n\n{reason or shares}\n"
    failures = failure_table(runs)
    return text + (f"\n## Not completed\n\n{markdown_table(failures)}" if failures else "")


def _cell(value: Any) -> Any:
    """As sweep.csv has it: a spreadsheet would run a text that begins like a formula."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    formula = text.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{text}" if formula and number(text) == inf else text


def write_report(runs: Runs, folder: Path, formats: Sequence[str] = ()) -> None:
    """Write sweep.csv, sweep.md and, once a run is scored, sweep.png: each whole or not at all.

    Of a search importance.png too, once enough trials are completed. Without matplotlib no plots.

    Args:
        runs: of the sweep.
        folder: of the report.
        formats: of the plot beside png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = run_table(runs)
    with (
        replacing(folder / "sweep.csv") as new,
        open(new, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerows([map(_cell, row) for row in (table[0], *(r.values() for r in table))])
    plots, search = can_plot("sweep.png"), runs.study is not None
    if plots:
        for kind in dict.fromkeys(["png", *formats]):
            with replacing(folder / f"sweep.{kind}") as new:
                (plot_trials if search else plot_sweep)(runs, new)
        if search:
            with replacing(folder / "importance.png") as new:
                if not plot_importances(runs, new):
                    (folder / "importance.png").unlink(missing_ok=True)
    write_whole(folder / "sweep.md", markdown(runs, plots))
