"""The report of a sweep: sweep.csv, sweep.md and sweep.png, from the files that its runs left.

What is read: overrides.json (what makes a run of the sweep what it is), summary.json (how it ended)
and provenance.json (its data). A run without summary.json is unfinished: running, or cut.
"""

import csv
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mogrifier_lm.errors import UserError

PAPER = (57.5, 56.4, 55.5, 54.8, 54.1, 54.3, 54.6)
"""Validation perplexity on PTB at 0 to 6 rounds and 24 million parameters, each point tuned (Melis
et al. 2020, arXiv 1909.01792)."""
PAPER_PARAMS = 24e6

MARKERS, ROUNDS = "osD^vPX*", "model.rounds"
# Overrides that a run without them still tells of in its summary.
TOLD = {ROUNDS: "rounds", "model.hidden_size": "hidden_size", "seed": "seed"}


@dataclass(kw_only=True)
class Run:
    """What a run's folder says."""

    dir: Path
    overrides: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    ended: float = 0.0  # seconds since 1970

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "unfinished"))

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    def value(self, key: str) -> str:
        """Of an override, "" where the run does not tell."""
        return self.overrides.get(key, str(self.summary.get(TOLD.get(key, ""), "")))

    def ppl(self, split: str, evaluator: str) -> float:
        """Perplexity; nan where it is not known."""
        score = self.summary.get(split, {}).get(evaluator, {})
        return float(score.get("ppl", math.nan))


def _json(path: Path) -> dict[str, Any]:
    """An object from a file; {} where there is none."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        return {"status": "failed", "error": f"{path.name} is damaged: {error}"}
    return values if isinstance(values, dict) else {}


def is_run(folder: Path) -> bool:
    names = ("overrides.json", "summary.json", "config.yaml")
    return any((folder / name).is_file() for name in names)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of folders that are each a sweep's or a run's.

    Raises:
        UserError: a folder that is neither.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        inside = sorted(folder.glob("*/"), key=lambda p: (len(p.name), p.name))
        found = [folder] if is_run(folder) else [path for path in inside if is_run(path)]
        if not found:
            raise UserError(f"{folder} is the folder neither of a run nor of a sweep")
        for path in found:
            summary = path / "summary.json"
            data = _json(path / "provenance.json").get("data", {})
            runs[path.resolve()] = Run(
                dir=path,
                overrides=_json(path / "overrides.json"),
                summary=_json(summary),
                data=data.get("name"),
                ended=summary.stat().st_mtime if summary.is_file() else 0.0,
            )
    return list(runs.values())


def evaluators_of(runs: Sequence[Run]) -> list[str]:
    """Every evaluator that scored a run, in order."""
    scores = [score for run in runs for score in run.summary.get("valid", {}).items()]
    return list(dict.fromkeys(name for name, score in scores if isinstance(score, Mapping)))


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """The overrides that differ between runs, but for the seed."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "seed")
    return [key for key in keys if len({run.value(key) for run in runs}) > 1]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _order(key: Sequence[str]) -> list[tuple[bool, float, str]]:
    """Numbers before words, 10 after 9."""
    numbers = [(math.isnan(_number(text)), _number(text), text) for text in key]
    return [(word, 0.0 if word else number, text) for word, number, text in numbers]


def groups(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    """Completed runs that differ in nothing but the seed, under the values of the swept keys."""
    keys, found = swept_keys(runs), dict[tuple[str, ...], list[Run]]()
    for run in filter(lambda run: run.completed, runs):
        found.setdefault(tuple(run.value(key) for key in keys), []).append(run)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan of less than two values, and of none."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def _spread(values: Sequence[float], digits: int = 2) -> str:
    known = [value for value in values if not math.isnan(value)]
    mean, sd = mean_sd(known)
    if not known:
        return ""
    return f"{mean:,.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def _span(values: Sequence[Any]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def run_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per run, as in sweep.csv; an empty cell is not known."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "seed")
    facts = ("params", "hidden_size", "status", "error")
    scores = [(split, name) for name in evaluators_of(runs) for split in ("valid", "test")]
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": str(run.dir)} | {key: run.value(key) for key in keys}
        row |= {"seed": run.value("seed")} | {fact: run.summary.get(fact, "") for fact in facts}
        row["status"] = run.status
        for split, name in scores:
            ppl = run.ppl(split, name)
            row[f"{split}/{name}/ppl"] = "" if math.isnan(ppl) else ppl
        row["tokens_per_second"] = run.summary.get("tokens_per_second", "")
        rows.append(row)
    return rows


def group_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per group: size, n, mean ± standard deviation over its seeds."""
    rows = []
    for key, group in groups(runs).items():
        row = dict(zip(swept_keys(runs), key, strict=True))
        row["hidden size"] = _span([run.summary["hidden_size"] for run in group])
        row["parameters"] = _span([run.summary["params"] for run in group])
        row["n"] = str(len(group))
        for name in evaluators_of(runs):
            for split in ("valid", "test"):
                row[f"{split}, {name}"] = _spread([run.ppl(split, name) for run in group])
        row["tokens/s"] = _spread([run.summary["tokens_per_second"] for run in group], 0)
        rows.append(row)
    return rows


def failure_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per run that has not completed, with the reason."""
    return [
        {"run": str(run.dir)}
        | {key: run.value(key) for key in swept_keys(runs)}
        | {"seed": run.value("seed"), "status": run.status}
        | {"reason": str(run.summary.get("error", ""))}
        for run in runs
        if not run.completed
    ]


def headline(runs: Sequence[Run]) -> str:
    """How many runs there are, how they ended, and what they have in common."""
    statuses = [run.status for run in runs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    varying = swept_keys(runs)
    fixed = [f"{k}={v}" for k, v in runs[0].overrides.items() if k not in (*varying, "seed")]
    text = f"{len(runs)} runs: {counts}." + (f" All with {' '.join(fixed)}." if fixed else "")
    floors = {run.summary.get("valid", {}).get("floor_ppl") for run in runs if run.completed}
    floor = floors.pop() if len(floors) == 1 else None
    return text + (f" The source's own validation perplexity is {floor:.2f}." if floor else "")


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "No run has completed yet.\n"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def markdown(runs: Sequence[Run]) -> str:
    """sweep.md."""
    text = f"# Sweep\n\n{headline(runs)}\n\n{_markdown(group_table(runs))}\nPerplexity per word, "
    text += "mean ± sample standard deviation over n seeds.\n\n![](sweep.png)\n"
    failures = failure_table(runs)
    return text + (f"\n## Not completed\n\n{_markdown(failures)}" if failures else "")


def not_comparable(runs: Sequence[Run]) -> str:
    """Why the paper's curve is of another setting; "" where it is not."""
    reasons, data = [], sorted({str(run.data) for run in runs})
    if data != ["ptb"]:
        reasons.append(f"data {', '.join(data)}")
    params = [run.summary["params"] for run in runs]
    if any(abs(number / PAPER_PARAMS - 1) > 0.02 for number in params):
        reasons.append(f"{_span([round(number / 1e6, 1) for number in params])} M parameters")
    return "; ".join(reasons)


def plot(runs: Sequence[Run], file: Path | IO[Any]) -> bool:
    """Draw perplexity, and tokens per second, against rounds (else another swept key).

    Means over seeds with their standard deviation, a line for each combination of the other swept
    keys, told apart by marker and lightness. Returns False, and draws nothing, where no run has
    been scored.

    Args:
        file: a path that ends in png or svg, or a stream, which gets svg.
    """
    found, keys, evaluators = groups(runs), swept_keys(runs), evaluators_of(runs)
    if not found or not evaluators:
        return False
    numeric = [
        key for i, key in enumerate(keys) if not any(math.isnan(_number(k[i])) for k in found)
    ]
    x_key = next((key for key in (ROUNDS, *numeric) if key in numeric), None)
    at = keys.index(x_key) if x_key else -1
    lines: dict[str, list[tuple[float, list[Run]]]] = {}
    for n, (key, group) in enumerate(found.items()):
        others = [f"{k.rpartition('.')[2]} {v}" for k, v in zip(keys, key, strict=True)
                  if k != x_key]  # fmt: skip
        label, x = (", ".join(others), _number(key[at])) if x_key else ("", float(n))
        lines.setdefault(label, []).append((x, group))

    paper = "" if x_key != ROUNDS else not_comparable([run for g in found.values() for run in g])
    plt = _pyplot()
    figure, axes = plt.subplots(
        3 if paper else 2, 1, figsize=(7, 7 if paper else 5.5), sharex=True, squeeze=False,
        height_ratios=[3, 1, 1] if paper else [3, 1], layout="constrained",
    )  # fmt: skip
    top, speed, last = axes[0, 0], axes[1, 0], axes[-1, 0]
    what: list[tuple[Any, Callable[[Run], float]]] = [
        (top, lambda run: run.ppl("valid", evaluators[0])),
        (speed, lambda run: float(run.summary["tokens_per_second"])),
    ]
    for i, (label, points) in enumerate(lines.items()):
        for panel, measure in what:
            stats = [mean_sd([measure(run) for run in group]) for _, group in points]
            panel.errorbar(
                [x for x, _ in points],
                [mean for mean, _ in stats],
                yerr=[0.0 if math.isnan(sd) else sd for _, sd in stats],
                color=plt.get_cmap("viridis")(0.85 * i / max(1, len(lines) - 1)),
                marker=MARKERS[i % len(MARKERS)],
                linestyle="-" if x_key else "none",
                capsize=3,
                label=label or "mean ± sd over seeds",
            )
    if x_key == ROUNDS:
        title = "Melis et al. 2020, PTB, 24 M parameters, tuned"
        style: dict[str, Any] = {"color": "0.4", "linestyle": "--", "marker": ".", "label": title}
        (last if paper else top).plot(range(len(PAPER)), PAPER, **style)
        if paper:
            last.set_title(f"{title}; not comparable: {paper}", fontsize="small")
            last.set_ylabel("perplexity")
    top.set_ylabel(f"validation perplexity ({evaluators[0]})")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    for panel in axes[:, 0]:
        panel.grid(alpha=0.3)
    if len(lines) > 1 or x_key == ROUNDS or x_key is None:
        top.legend(frameon=False)
    if x_key:
        last.set_xlabel("rounds" if x_key == ROUNDS else x_key)
        values = sorted({x for points in lines.values() for x, _ in points})
        if values[0] > 0 and values[-1] / values[0] >= 30:
            last.set_xscale("log")
        elif x_key == ROUNDS:
            last.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    else:
        names = [", ".join(key) or "all" for key in found]
        last.set_xticks(range(len(names)), names, rotation=20, ha="right")
    _save(figure, file)
    return True


def plot_all_curves(runs: Sequence[Run], file: Path | IO[Any]) -> bool:
    """Draw validation perplexity over training tokens, a line per run; False if there is none."""
    curves = []
    for run in runs:
        path = run.dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        points = [json.loads(line) for line in lines if line.endswith("}")]
        points = [point for point in points if "valid/ppl" in point]
        if points:
            curves.append((tuple(run.value(key) for key in swept_keys(runs)), points))
    if not curves:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    kinds = sorted({key for key, _ in curves}, key=_order)
    for key, points in sorted(curves, key=lambda curve: _order(curve[0])):
        i = kinds.index(key)
        xs, ys = zip(*((p["tokens"] / 1e6, p["valid/ppl"]) for p in points), strict=True)
        color = plt.get_cmap("viridis")(0.85 * i / max(1, len(kinds) - 1))
        new = key not in axes.get_legend_handles_labels()[1]
        axes.plot(xs, ys, color=color, marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1,
                  label=", ".join(key) if new else None)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.3, which="both")
    if 1 < len(kinds) <= 20:
        axes.legend(frameon=False, fontsize="small", title=", ".join(swept_keys(runs)), ncols=2)
    _save(figure, file)
    return True


def _pyplot() -> Any:
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: smaller, and can be searched
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, file: Path | IO[Any]) -> None:
    if isinstance(file, Path):
        figure.savefig(file, dpi=150)
    else:
        figure.savefig(file, format="svg", metadata={"Date": None})
    _pyplot().close(figure)


def write_report(runs: Sequence[Run], folder: Path) -> None:
    """Write sweep.csv, sweep.md and, once a run has been scored, sweep.png, each whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        table = run_table(runs)
        with open(Path(scratch, "sweep.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        Path(scratch, "sweep.md").write_text(markdown(runs))
        plot(runs, Path(scratch, "sweep.png"))
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def progress(runs: Sequence[Run], grid: Sequence[Mapping[str, str]], began: float) -> str:
    """How far a sweep is, in one line: done, failed, left, and for how long.

    Args:
        runs: of its folder.
        grid: the overrides of every run that its command asks for; empty where that is not known.
        began: when the command did, seconds since 1970; runs ended before it tell nothing of speed.
    """
    status = {frozenset(run.overrides.items()): run.status for run in runs}
    asked = [status.get(frozenset(job.items())) for job in grid] or [run.status for run in runs]
    done, failed = asked.count("completed"), asked.count("failed")
    text = f"{done} of {len(asked)} runs done, {failed} failed, {len(asked) - done - failed} left"
    fresh = sum(run.completed and run.ended > began for run in runs)
    if fresh and done + failed < len(asked):
        minutes = (time.time() - began) / fresh * (len(asked) - done - failed) / 60
        text += f", about {minutes:.0f} min"
    return text
