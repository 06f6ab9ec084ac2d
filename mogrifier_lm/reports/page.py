"""A report as one page that needs nothing else: tables that sort, curves, the plot of the sweep."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import IO, Any

from mogrifier_lm.reports.folders import Runs
from mogrifier_lm.reports.plots import can_plot
from mogrifier_lm.reports.sweep import failure_table, group_table, headline, run_table
from mogrifier_lm.reports.sweep_plots import plot_curves_of, plot_sweep
from mogrifier_lm.reports.trials import importance_table, plot_importances, plot_trials, trial_table

PAGE = Path(__file__).with_name("page.html")


def _cell(value: Any) -> str:
    formats = {float: "{:,.2f}", int: "{:,}"}
    text = formats.get(type(value), "{}").format(value)
    kind = ' class="number"' if text.lstrip("-")[:1].isdigit() else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>\n" for row in rows)
    return (
        f'<h2>{caption}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def page(runs: Runs, title: str) -> str:
    """The report of runs as one page of HTML that asks for no other file and no network.

    Args:
        runs: of a sweep, a search, or single ones.
        title: of the page.

    Returns:
        HTML; without matplotlib, without its drawings.
    """
    draws: list[Callable[[Runs, IO[str]], bool]] = [plot_sweep, plot_curves_of]
    if runs.study:
        body = _table("Trials, best first", trial_table(runs))
        body += _table("Importance", importance_table(runs))
        draws = [plot_trials, plot_importances, plot_curves_of]
    else:
        body = _table("Mean ± standard deviation over seeds", group_table(runs))
    body += _table("Not completed", failure_table(runs))
    for draw in draws if can_plot("what the page would draw") else []:
        svg = io.StringIO()
        if draw(runs, svg):
            body += f"<figure>{svg.getvalue()[svg.getvalue().index('<svg') :]}</figure>\n"
    rows = run_table(runs)
    said = {key for key in rows[0] if len(rows) > 1 and len({str(row[key]) for row in rows}) == 1}
    said.add("error")
    body += _table("Runs", [{k: v for k, v in row.items() if k not in said} for row in rows])
    title, line = html.escape(title), html.escape(headline(runs))
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=title, headline=line, body=body
    )
