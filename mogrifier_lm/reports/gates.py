"""Pictures of what the rounds do: x and h that gate each other, from a model's own numbers."""

from pathlib import Path
from typing import Any

import numpy as np

from mogrifier_lm.files import replacing
from mogrifier_lm.inference.gates import Gates
from mogrifier_lm.reports.plots import can_plot, caption, pyplot, save

FEATURES = 16  # of x and of h, shown in a picture
VALUES, FACTORS = "PuOr", "PRGn"  # colours that all eyes tell apart


def plot_moved(gates: Gates, path: Path) -> None:
    """How far x and h move in each round at each word, a panel a layer.

    Args:
        gates: of a line.
        path: of a png, pdf or svg.
    """
    if not can_plot(path.name):
        return
    plt, moved = pyplot(), gates.moved()
    size = (max(5.0, 2.5 + 0.4 * len(gates.words)), 1.3 + len(moved) * (0.5 + 0.3 * moved.shape[1]))
    figure, axes = plt.subplots(
        len(moved), 1, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for number, (axis, layer) in enumerate(zip(axes[:, 0], moved, strict=True), start=1):
        # Cells as shapes, not as a picture in the picture: it stays sharp, and small.
        cells = axis.pcolormesh(layer, cmap="viridis", vmin=0, vmax=moved.max(), edgecolor="w")
        names = [f"{i}, {'h' if i % 2 == 0 else 'x'}" for i in range(1, len(layer) + 1)]
        axis.set_yticks(np.arange(len(layer)) + 0.5, names)
        axis.set_ylabel(f"layer {number}: round")
        axis.invert_yaxis()
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    words = np.arange(len(gates.words)) + 0.5
    names = [caption(word) for word in gates.words]
    axes[-1, 0].set_xticks(words, names, rotation=60, ha="right", rotation_mode="anchor")
    figure.colorbar(cells, ax=axes[:, 0], label="root mean square of ln(gate)")
    figure.suptitle("how far x and h are moved, by round and word", fontsize="medium")
    with replacing(path) as new:
        save(figure, new)


def plot_interaction(gates: Gates, path: Path, word: int, layer: int = 1) -> None:
    """The rounds of one step: x and h gate each other in turn (as figure 1 of arXiv 1909.01792).

    Args:
        gates: of a line.
        path: of a png, pdf or svg.
        word: that the step reads, from 1; 0 is the <eos> before it.
        layer: from 1.
    """
    if not can_plot(path.name):
        return
    plt, rounds = pyplot(), [g[word] for g in gates.layers[layer - 1]]
    values = [v[word] for v in gates.inputs[layer - 1]]  # x and h
    chosen = [_most_moved(rounds[side::2], len(values[side])) for side in (0, 1)]
    scales = [np.abs(v).max() or 1.0 for v in values]
    figure, axis = plt.subplots(figsize=(2.6 + 1.75 * len(rounds), 4.2), layout="constrained")
    now, at = list(values), [0.0, 0.0]  # x and h, and where they were drawn last
    for side in (0, 1):
        _strip(axis, 0, side, values[side][chosen[side]], VALUES, scales[side])
        _name(axis, 0, side, "$x^{-1}$, the word" if side == 0 else "$h^0$, the state")
    for i, factor in enumerate(rounds, start=1):
        side, x = (i - 1) % 2, 2.0 * i  # the row that is gated
        _strip(axis, x - 0.45, side, factor[chosen[side]] - 1, FACTORS, 1.0)
        origin, known = (at[1 - side], i - 1) if gates.zigzag else (0.0, -side)
        _arrow(axis, (origin, 1 - side), (x - 0.45, side), linestyle="--", color="0.4")
        now[side] = factor * now[side]
        _strip(axis, x, side, now[side][chosen[side]], VALUES, scales[side])
        _arrow(axis, (at[side] + 0.2, side), (x - 0.65, side), color="0.4")
        own, matrix, other = ("x", "Q", "h") if side == 0 else ("h", "R", "x")
        _name(axis, x - 0.2, side, f"round {i}: ${own}^{i} = "
              f"2\\sigma({matrix}^{i}{other}^{{{known}}}) \\odot {own}^{{{i - 2}}}$")  # fmt: skip
        at[side] = x
    end = 2.0 * len(rounds) + 1.2
    for side in (0, 1):
        _arrow(axis, (at[side] + 0.2, side), (end - 0.27, side), color="0.4")
    axis.add_patch(plt.Rectangle((end - 0.25, -0.3), 0.5, 1.6, facecolor="w", edgecolor="0.4"))
    axis.text(end, 0.5, "cell", rotation=90, ha="center", va="center", fontsize="large")
    axis.set_xlim(-0.8, end + 0.4)
    axis.set_ylim(1.72, -0.72)
    axis.axis("off")
    near = " ".join(gates.words[max(1, word - 5) : word])
    title = caption(f"layer {layer} reads «{gates.words[word]}» after «{near}»")
    axis.set_title(title, fontsize="medium")
    bars = (
        (VALUES, "x and h; 1 is the largest before the rounds", (-1, 1)),
        (FACTORS, "gate", (0, 2)),
    )
    for colours, label, ends in bars:
        shown = plt.cm.ScalarMappable(plt.Normalize(*ends), colours)
        bar = figure.colorbar(shown, ax=axis, label=label, fraction=0.02, pad=0.01, aspect=40)
        bar.ax.tick_params(labelsize="x-small")
    with replacing(path) as new:
        save(figure, new)


def _most_moved(factors: list[np.ndarray], size: int) -> np.ndarray:
    """The features that the gates of a row move most, in their order."""
    total = sum((np.abs(np.log(f)) for f in factors), np.zeros(size))
    return np.sort(np.argsort(-total, kind="stable")[:FEATURES])


def _strip(axis: Any, x: float, side: int, values: np.ndarray, colours: str, scale: float) -> None:
    """A vector as a column of cells, centred at x in the row of x (0) or of h (1)."""
    edges_x, edges_y = [x - 0.16, x + 0.16], np.linspace(side - 0.3, side + 0.3, len(values) + 1)
    axis.pcolormesh(
        edges_x, edges_y, values[:, None], cmap=colours, vmin=-scale, vmax=scale, edgecolor="0.8",
        linewidth=0.3, zorder=2,
    )  # fmt: skip


def _name(axis: Any, x: float, side: int, text: str) -> None:
    y, va = (side - 0.36, "bottom") if side == 0 else (side + 0.36, "top")
    axis.text(x, y, text, ha="center", va=va, fontsize="small")


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], **look: Any) -> None:
    """From one strip to another; between the rows from edge to edge."""
    if start[1] != end[1]:
        towards = 0.31 if start[1] < end[1] else -0.31
        start, end = (start[0], start[1] + towards), (end[0], end[1] - towards)
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", **look}, zorder=1)
