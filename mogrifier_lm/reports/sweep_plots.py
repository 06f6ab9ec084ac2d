"""The plots of a sweep, readable without colour: lines differ in marker and lightness."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mogrifier_lm.reports.folders import (
    Run,
    Runs,
    evaluators,
    groups,
    mean_sd,
    number,
    span,
    swept,
)
from mogrifier_lm.reports.plots import caption, drawn, look, pyplot, save

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
        shown = span([round(n, 0 if n >= 1 else 2) for n in epochs])
        reasons.append(f"{shown} epochs in the place of {PAPER_EPOCHS}")
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

    Means over seeds, with their standard deviation and each seed as a dot, a line for each
    combination of the other swept keys; beside them perplexity against parameters and time. The
    paper's curve stands beside rounds where it is comparable, else the reasons why it is not.

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

    plt = pyplot()
    figure, places = plt.subplot_mosaic(
        [["ppl", "params"], ["ppl", "time"], ["speed", "time"]],
        figsize=(11, 5.5), width_ratios=[3, 2], layout="constrained",
    )  # fmt: skip
    ppl, speed = places["ppl"], places["speed"]
    speed.sharex(ppl)
    ppl.tick_params(labelbottom=False)
    for i, (name, points) in enumerate(lines.items()):
        style = look(i, len(lines))
        seen = [(x, run) for x, group in points for run in group]
        counts = span([len(group) for _, group in points])
        at = [group for _, group in points]
        found_ppls = [[drawn(run.ppl("valid", names[0])) for run in group] for group in at]
        speeds = [[drawn(run.summary["tokens_per_second"]) for run in group] for group in at]
        for panel, values in ((ppl, found_ppls), (speed, speeds)):
            stats = [mean_sd(of_group) for of_group in values]
            panel.errorbar(
                [x for x, _ in points],
                [mean for mean, _ in stats],
                yerr=[0 if math.isnan(sd) else sd for _, sd in stats],
                linestyle="-" if x_key else "none",
                capsize=3,
                label=f"{caption(name)} (n = {counts})",
                **style,
            )
        dots = {"s": 10, "color": style["color"], "alpha": 0.5, "zorder": 3}
        ppls = sum(found_ppls, start=[])
        ppl.scatter([x for x, _ in seen], ppls, **dots)
        for place, key, unit in (("params", "params", 1e6), ("time", "seconds", 60.0)):
            costs = [drawn(run.summary.get(key)) / unit for _, run in seen]
            places[place].scatter(costs, ppls, **dots | {"s": 22, "marker": style["marker"]})
    ppl.set_ylabel(caption(f"validation perplexity ({names[0]})"))
    speed.set_ylabel("tokens/s" + "\n(runs side by side)" * any(run.beside for run in ran))
    speed.set_ylim(0, 1.1 * speed.get_ylim()[1])
    for name in ("params", "time"):
        places[name].xaxis.set_major_locator(plt.MaxNLocator(4))
    places["params"].set_xlabel("parameters, millions")
    places["time"].set_xlabel("training time, minutes")
    if x_key == ROUNDS:
        text = "Melis et al. 2020: PTB, 24 M parameters, tuned"
        if reason:
            ppl.set_title(f"{text}: not comparable\n({caption(reason)})", fontsize="small")
        else:
            ppl.plot(range(len(PAPER)), PAPER, color="0.4", linestyle="--", marker=".", label=text)
        speed.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for panel in places.values():
        panel.grid(alpha=0.3)
    ppl.legend(frameon=False, fontsize="small")
    speed.set_xlabel("rounds" if x_key == ROUNDS else caption(x_key or ", ".join(keys)))
    if not x_key:
        ticks = [caption(", ".join(values)) or "all" for values in found]
        speed.set_xticks(range(len(ticks)), ticks, rotation=20, ha="right")
    elif x_key != ROUNDS and min(xs := [number(run.value(x_key)) for run in ran]) > 0:
        speed.set_xscale("log" if max(xs) / min(xs) > 30 else "linear")
    save(figure, file)
    return True


def plot_curves_of(runs: Runs, file: Path | IO[str]) -> bool:
    """Draw validation perplexity over training tokens, a line per run.

    Args:
        runs: those without a validation are left out.
        file: a path, or a stream that gets svg.

    Returns:
        False, with nothing drawn, where no run has been validated.
    """
    curves: dict[str, list[list[dict[str, float]]]] = {}
    search = runs.study is not None
    for run in runs:
        points = list(run.folder.rows("valid/ppl"))
        name = run.folder.path.name if search else ", ".join(run.value(key) for key in swept(runs))
        if points:
            curves.setdefault(name, []).append(points)
    if not curves:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, seeds) in enumerate(curves.items()):
        for n, points in enumerate(seeds):
            tokens = [drawn(p["tokens"] / 1e6) for p in points]
            ppls = [drawn(p["valid/ppl"]) for p in points]
            style = look(i, len(curves)) | {"markersize": 3, "linewidth": 1}
            axes.plot(tokens, ppls, label=None if n else caption(name), **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plt.LogFormatter())
    axes.yaxis.set_minor_formatter(plt.LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("validation perplexity, while training")
    axes.grid(alpha=0.3, which="both")
    if len(curves) > 1:
        title, columns = ("trial", 6) if search else (caption(", ".join(swept(runs))), 3)
        axes.legend(frameon=False, fontsize="x-small", title=title, ncols=columns)
    save(figure, file)
    return True
