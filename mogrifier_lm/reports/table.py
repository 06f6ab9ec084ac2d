"""Tables as text: that at the end of a run, and markdown's."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.terminal import plain

LIMIT = 1e100  # of numbers that sums and plots can take


def score_table(summary: Mapping[str, Any]) -> str:
    """A line for each evaluator, and for the variants that it reports beside its own score.

    Raises:
        UserError: the splits do not hold the same scores, or some that are no numbers.
    """
    try:
        rows = [("", "validation", "test"), *_score_rows(summary["valid"], summary["test"])]
    except (LookupError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"the summary is damaged: its scores are not what a run writes ({one_line(error)})"
        ) from error
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {valid:>10}  {test:>10}" for name, valid, test in rows)


def _score_rows(valid: Mapping[str, Any], test: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name in (name for name in valid if name != "floor_ppl"):
        if "bits_per_character" in valid[name]:
            rows += _without_words(name, valid[name], test[name])
            continue
        subwords = valid[name]["tokens"] != valid[name]["words"]
        for key in (k for k in valid[name] if k.endswith("ppl") and (subwords or k != "token_ppl")):
            label = f"{name} {key}".replace("_ppl", "").replace(" ppl", "")
            rows.append((f"{label} perplexity", figure(valid[name][key]), figure(test[name][key])))
        if subwords:
            v, t = valid[name]["bits_per_byte"], test[name]["bits_per_byte"]
            rows.append((f"{name} bits per byte", figure(v, 4), figure(t, 4)))
    if "floor_ppl" in valid:
        name, floor = "floor (the source itself)", "floor_ppl"
        rows.append((name, figure(valid[floor]), figure(test[floor])))
    return rows


def figure(value: float | None, digits: int = 2, per: int = 1) -> str:
    """A number of summary.json divided by `per`; its null is what no number of JSON holds."""
    if value is None or not math.isfinite(value):
        return "infinite"
    return f"{value / per:.{digits}f}" if value < 1e7 * per else f"{value / per:.3g}"


def _without_words(
    name: str, valid: Mapping[str, Any], test: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Lines for a text whose tokens are characters, or whose words are too long to be a unit."""
    long = valid["tokens"] != valid["characters"]
    why = f" (words of {valid['characters'] / valid['words']:.0f} characters)" if long else ""
    figures = {
        "nats a token": [figure(s["nats"], 4, s["tokens"]) for s in (valid, test)],
        f"bits per character{why}": [figure(s["bits_per_character"], 4) for s in (valid, test)],
        "bits per byte": [figure(s["bits_per_byte"], 4) for s in (valid, test)],
    }
    return [(f"{name} {label}", v, t) for label, (v, t) in figures.items()]


def shown_ppl(score: Mapping[str, Any]) -> float:
    """Perplexity per word, or per token where words are no unit; nan where there is none."""
    ppl = score.get("token_ppl" if "bits_per_character" in score else "ppl")
    return math.nan if ppl is None else float(ppl)


def objective(summary: Mapping[str, Any]) -> float:
    """Validation perplexity of the first evaluator, which a sweeper minimises; nan without one."""
    scores = summary["valid"].values()
    return next((shown_ppl(score) for score in scores if isinstance(score, Mapping)), math.nan)


def final_table(summary: Mapping[str, Any], run_dir: Path) -> str:
    """What a run prints at its end: perplexities, size, speed, where the files are.

    Args:
        summary: what summary.json holds.
        run_dir: as it is to be shown.

    Returns:
        Lines with an empty one before and after.
    """
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    facts = {
        "parameters": f"{summary['params']:,}",
        "trained on": f"{summary['tokens']:,} tokens, {summary['epochs']:.2f} epochs",
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s",
        "time": f"{minutes} min {seconds:02d} s",
        "files": str(run_dir),
    }
    scores = score_table(summary)
    width = max(scores.index("  validation"), *map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(["", scores, *lines, ""])


def markdown_text(text: str) -> str:
    """A text of anybody's in one line of markdown: no HTML, image, link or end of a cell."""
    for mark in ("\\", "<", "|"):
        text = text.replace(mark, f"\\{mark}")
    return plain(" ".join(text.replace("](", "]\\(").split()))


def latex_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a tabular of LaTeX, with the rules of the package booktabs."""
    if not rows:
        return ""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"} | {"±": r"$\pm$", "†": r"$\dagger$"}

    def line(cells: Iterable[Any]) -> str:
        texts = ("".join(special.get(c, c) for c in str(cell)) for cell in cells)
        return f"{' & '.join(texts)} \\\\"

    head, *body = [line(rows[0]), *(line(row.values()) for row in rows)]
    columns = "l" * len(rows[0])
    parts = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"]) + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a table of markdown that reads as well in a terminal.

    Columns of numbers are set to the right. No rows give an empty text.
    """
    if not rows:
        return ""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    cells = [[markdown_text(str(cell)) for cell in line] for line in lines]
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(re.match(r"[-+−]?\d|$", cell) for cell in column[1:]) for column in columns]
    rules = ["-" * (w - r) + ":" * r for w, r in zip(widths, right, strict=True)]
    return "".join(
        "| "
        + " | ".join(
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(line, widths, right, strict=True)
        )
        + " |\n"
        for line in [cells[0], rules, *cells[1:]]
    )
