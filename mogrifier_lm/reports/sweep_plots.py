"""The plots of a sweep, readable without colour: lines differ in marker and lightness."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mogrifier_lm.reports.folders import (
    Run,
    evaluators,
    groups,
    mean_sd,
    number,
    span,
    study_of,
    swept,
)
from mogrifier_lm.reports.plots import look, pyplot, save

ROUNDS = "model.rounds"
PAPER = (57.5, 56.4, 55.5, 54.8, 54.1, 54.3, 54.6)
"""Validation perplexity on PTB at 0 to 6 rounds, each tuned; Melis et al., arXiv 1909.01792."""
PAPER_PARAMS, PAPER_EPOCHS = 24e6, 145


def not_comparable(runs: Sequence[Run]) -> str:
    """Why the paper's curve is of another setting than these runs; "" where it is not."""
    reasons, data = [], sorted({str(run.data) for run in runs})
    if data != ["ptb"]:
        reasons.append(f"data {', '.join(data)}")
    params = [run.summary["params"] for run in runs]
    if any(abs(n / PAPER_PARAMS - 1) > 0.02 for n in params):
        reasons.append(f"{span([float(f'{n / 1e6:.2g}') for n in params])} M parameters")
    epochs = [run.summary.get("epochs", 0) for run in runs]
    if min(epochs) < PAPER_EPOCHS / 2:
        reasons.append(f"{span([round(n) for n in epochs])} epochs in the place of {PAPER_EPOCHS}")
    return "; ".join(reasons)


def series(runs: Sequence[Run]) -> tuple[str | None, dict[str, list[tuple[float, list[Run]]]]]:
    """What a sweep is plotted over, and its lines.

    Returns:
        rounds, else another swept key with numbers, None where there is none; and for each
        combination of the other swept keys, by its label, x and the runs there.
    """
    found, keys = groups(runs), swept(runs)
    numeric = [k for i, k in enumerate(keys) if all(number(v[i]) < math.inf for v in found)]
    x_key = ROUNDS if ROUNDS in numeric else next(iter(numeric), None)
    lines: dict[str, list[tuple[float, list[Run]]]] = {}
    for n, (values, group) in enumerate(found.items()):
        setting = dict(zip(keys, values, strict=True))
        x = number(setting.pop(x_key)) if x_key else n
        label = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in setting.items() if x_key)
        lines.setdefault(label or "mean ± sd over seeds", []).append((x, group))
    return x_key, lines


def plot_sweep(runs: Sequence[Run], file: Path | IO[str]) -> bool:
    """Draw perplexity and tokens per second against rounds, else against another swept key.

    Means over seeds, with their standard deviation, a line for each combination of the other swept
    keys. The paper's curve stands beside rounds, in a panel of its own where it is not comparable.

    Args:
        file: a path, or a stream that gets svg.

    Returns:
        False, with nothing drawn, where no run has been scored.
    """
    found, keys, names = groups(runs), swept(runs), evaluators(runs)
    if not names:
        return False
    x_key, lines = series(runs)
    ran = [run for group in found.values() for run in group]
    reason = not_comparable(ran) if x_key == ROUNDS else ""

    plt, heights = pyplot(), [3, 1, 1] if reason else [3, 1]
    figure, panels = plt.subplots(
        len(heights), 1, figsize=(7, 2.2 + len(heights) * 1.5), sharex=True,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for i, (label, points) in enumerate(lines.items()):
        ppls = [mean_sd([run.ppl("valid", names[0]) for run in group]) for _, group in points]
        speeds = [mean_sd([r.summary["tokens_per_second"] for r in group]) for _, group in points]
        for panel, stats in zip(panels, (ppls, speeds), strict=False):
            panel.errorbar(
                [x for x, _ in points],
                [mean for mean, _ in stats],
                yerr=[0 if math.isnan(sd) else sd for _, sd in stats],
                linestyle="-" if x_key else "none",
                capsize=3,
                label=label,
                **look(i, len(lines)),
            )
    panels[0].set_ylabel(f"validation perplexity ({names[0]})")
    panels[1].set_ylabel("tokens/s")
    panels[1].set_ylim(0, 1.1 * panels[1].get_ylim()[1])
    if x_key == ROUNDS:
        text = "Melis et al. 2020: PTB, 24 M parameters, tuned"
        paper = panels[2] if reason else panels[0]
        paper.plot(range(len(PAPER)), PAPER, color="0.4", linestyle="--", marker=".", label=text)
        panels[-1].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    if reason:
        paper.set_title(f"{text}\nnot comparable: {reason}", fontsize="small")
        paper.set_ylabel("perplexity")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("rounds" if x_key == ROUNDS else x_key or ", ".join(keys))
    if not x_key:
        ticks = [", ".join(values) or "all" for values in found]
        panels[-1].set_xticks(range(len(ticks)), ticks, rotation=20, ha="right")
    elif x_key != ROUNDS and min(xs := [number(run.value(x_key)) for run in ran]) > 0:
        panels[-1].set_xscale("log" if max(xs) / min(xs) > 30 else "linear")
    save(figure, file)
    return True


def plot_curves_of(runs: Sequence[Run], file: Path | IO[str]) -> bool:
    """Draw validation perplexity over training tokens, a line per run; False if there is none."""
    curves: dict[str, list[list[dict[str, float]]]] = {}
    search = study_of(runs) is not None
    for run in runs:
        points = list(run.folder.rows("valid/ppl"))
        label = run.folder.path.name if search else ", ".join(run.value(key) for key in swept(runs))
        if points:
            curves.setdefault(label, []).append(points)
    if not curves:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (label, seeds) in enumerate(curves.items()):
        for n, points in enumerate(seeds):
            tokens, ppls = [p["tokens"] / 1e6 for p in points], [p["valid/ppl"] for p in points]
            style = look(i, len(curves)) | {"markersize": 3, "linewidth": 1}
            axes.plot(tokens, ppls, label=None if n else label, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plt.LogFormatter())
    axes.yaxis.set_minor_formatter(plt.LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("validation perplexity, while training")
    axes.grid(alpha=0.3, which="both")
    if len(curves) > 1:
        title, columns = ("trial", 6) if search else (", ".join(swept(runs)), 3)
        axes.legend(frameon=False, fontsize="x-small", title=title, ncols=columns)
    save(figure, file)
    return True
