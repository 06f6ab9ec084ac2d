"""Plots: what they share, and the curves of one run."""

import logging
import math
from pathlib import Path
from typing import IO, Any

from mogrifier_lm.files import replacing
from mogrifier_lm.reports.table import LIMIT
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.terminal import plain

log = logging.getLogger(__name__)

FORMATS = ("png", "pdf", "svg")


def can_plot(name: str) -> bool:
    """Whether matplotlib is installed; if not, one line says that `name` is left out."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        log.warning("matplotlib is not installed: %s is left out", name)
        return False
    return True


def pyplot() -> Any:
    """matplotlib for files alone; imported late, for it takes a second."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, and can be searched
    from matplotlib import pyplot as plt

    return plt


def look(i: int, n: int) -> dict[str, Any]:
    """Colour and marker of a line, told from others without colour too, by lightness and shape.

    Args:
        i: which line, from 0.
        n: of how many.

    Returns:
        Keyword arguments of matplotlib's `plot`.
    """
    shade = 0.85 * i / max(1, n - 1)
    return {"color": pyplot().get_cmap("viridis")(shade), "marker": "osD^vPX*"[i % 8]}


def caption(text: str, most: int = 60) -> str:
    """A text of anybody's as matplotlib shows it: no formula between dollars, no endless line."""
    return plain(text if len(text) <= most else f"{text[:most]}…").replace("$", r"\$")


def drawn(value: Any) -> float:
    """A number that an axis can take, logarithmic ones too; nan, which is left out, for others."""
    return value if isinstance(value, int | float) and 1 / LIMIT < value < LIMIT else math.nan


def save(figure: Any, file: Path | IO[str]) -> None:
    """Write a figure, as png, pdf or svg by the file's ending, to a stream as svg; close it."""
    if isinstance(file, Path):  # under the free name that it has while it is written, too
        kind = next((s[1:] for s in file.suffixes if s[1:] in FORMATS), "png")
    else:
        kind = "svg"
    figure.savefig(file, dpi=150, format=kind)
    pyplot().close(figure)


def plot_curves(folder: RunFolder, kind: str = "png") -> Path | None:
    """Draw training and validation perplexity, the floor, and the learning rate over tokens.

    Args:
        folder: of the run.
        kind: of the file, one of FORMATS.

    Returns:
        Where it is; None where matplotlib is not installed.
    """
    if not can_plot(folder.curves.name):
        return None
    plt = pyplot()

    def series(key: str) -> tuple[list[float], list[float]]:
        rows = [(drawn(row["tokens"] / 1e6), drawn(row[key])) for row in folder.rows(key)]
        rows = [row for row in rows if not math.isnan(sum(row))]
        return [x for x, _ in rows], [y for _, y in rows]

    data = folder.read_provenance().get("data", {}).get("name")
    floor = folder.read_summary().get("valid", {}).get("floor_ppl")
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    top.plot(*series("train/ppl"), color="0.6", linewidth=1, label="training, with dropout")
    valid = series("valid/ppl")
    top.plot(*valid, color="C0", marker="o", markersize=3, label="validation")
    if valid[1]:
        best = min(range(len(valid[1])), key=valid[1].__getitem__)
        top.annotate(
            f"{valid[1][best]:.2f}",
            (valid[0][best], valid[1][best]),
            textcoords="offset points",
            xytext=(0, 10),
            ha="right",
            color="C0",
        )
    if floor and not math.isnan(drawn(floor)):
        text = f"floor, the source itself: {floor:.2f}"
        top.axhline(floor, color="0.3", linestyle="--", linewidth=1, label=text)
    top.set_title(caption(f"{folder}: {data}" if data else str(folder), 300), fontsize="medium")
    top.set_yscale("log")
    top.margins(y=0.12)  # room for the figure
    ticks = plt.LogLocator(subs=(1.0, 2.0, 5.0))
    top.yaxis.set_major_locator(ticks)
    top.yaxis.set_major_formatter(plt.ScalarFormatter())
    top.yaxis.set_minor_formatter(plt.NullFormatter())
    top.set_ylabel("perplexity")
    top.grid(alpha=0.3)
    top.legend(loc="upper right", frameon=False)
    bottom.plot(*series("train/lr"), color="0.3", linewidth=1)
    bottom.set_yscale("log")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("training tokens, millions")
    bottom.grid(alpha=0.3)
    path = folder.curves.with_suffix(f".{kind}")
    with replacing(path) as new:
        save(figure, new)
    return path
