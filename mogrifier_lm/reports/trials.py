"""What the report of a sweep says of a search: its best trials, and which keys mattered."""

import math
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mogrifier_lm.errors import UserError
from mogrifier_lm.reports.folders import Run, Runs, completed, evaluators, number, swept
from mogrifier_lm.reports.plots import caption, drawn, pyplot, save
from mogrifier_lm.reports.sweep import SHARED, run_table
from mogrifier_lm.runs.folder import Status

if TYPE_CHECKING:
    import optuna

NAME = "search"  # of the study in its file
ENOUGH = 20
"""Completed trials below which importances say nothing: PED-ANOVA wants 5 in the best quarter."""


def storage(path: Path) -> "optuna.storages.JournalStorage":
    """Optuna's storage of the file that holds a study.

    Raises:
        UserError: Optuna is not installed.
    """
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError('Optuna is not installed: pip install "mogrifier_lm[search]"') from error
    return JournalStorage(JournalFileBackend(str(path)))


def _completed_trials(runs: Runs) -> "tuple[optuna.Study, list[optuna.trial.FrozenTrial]]":
    assert runs.study is not None
    stored = storage(runs.study)
    import optuna

    study = optuna.load_study(study_name=NAME, storage=stored)
    return study, study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])


def why_no_importances(runs: Runs) -> str:
    """Why there are no importances, in one line; "" where there are."""
    try:
        found = len(_completed_trials(runs)[1])
    except UserError as error:
        return str(error)
    return "" if found >= ENOUGH else f"Told from {ENOUGH} completed trials on; there are {found}."


def importances(runs: Runs) -> dict[str, float]:
    """Key → its share in what sets the best quarter of the completed trials apart; {} if unknown.

    By PED-ANOVA (arXiv 2304.10255). Trials that were pruned have no value and do not count.
    """
    if why_no_importances(runs):
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        return get_param_importances(_completed_trials(runs)[0], evaluator=evaluator)


def importance_table(runs: Runs) -> list[dict[str, str]]:
    """A row per key with its importance, as in `importances`, the largest first."""
    return [{"key": k, "importance": f"{v:.2f}"} for k, v in importances(runs).items()]


def trial_table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per completed run, best first."""
    rows, names = [], evaluators(runs)
    folders = {id(run): row["run"] for run, row in zip(runs, run_table(runs), strict=True)}
    for run in sorted(completed(runs), key=lambda run: run.ppl("valid", names[0])):
        row = {"trial": folders[id(run)]} | {key: run.value(key) for key in swept(runs)}
        row["parameters"] = f"{run.summary['params']:,}"
        row["tokens/s"] = f"{run.summary['tokens_per_second']:,.0f}{SHARED * bool(run.beside)}"
        for name in names:
            row |= {f"{s}, {name}": f"{run.ppl(s, name):.2f}" for s in ("valid", "test")}
        rows.append(row)
    return rows


def plot_importances(runs: Runs, file: Path | IO[str]) -> bool:
    """Draw the importances as bars.

    Args:
        runs: of a search.
        file: a path, or a stream that gets svg.

    Returns:
        False, with nothing drawn, where there are none.
    """
    shares = importances(runs)
    if not shares:
        return False
    figure, axes = pyplot().subplots(figsize=(7, 1 + 0.3 * len(shares)), layout="constrained")
    axes.bar_label(
        axes.barh([caption(key) for key in shares], list(shares.values()), color="0.5"), fmt=" %.2f"
    )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("importance (PED-ANOVA; the best quarter of the completed trials)")
    save(figure, file)
    return True


def plot_trials(runs: Sequence[Run], file: Path | IO[str]) -> bool:
    """Draw validation perplexity against each key, of pruned runs the best they had come to.

    Optuna's own slices show completed trials alone and tell them apart by shades of one colour.

    Args:
        runs: of a search.
        file: a path, or a stream that gets svg.

    Returns:
        False, with nothing drawn, where no run has been scored or no key varies.
    """
    keys, names, scored = swept(runs), evaluators(runs), completed(runs)
    if not names or not keys:
        return False
    ppls = {id(run): run.ppl("valid", names[0]) for run in scored}
    best = min(scored, key=lambda run: ppls[id(run)])
    groups = [  # markers that are told apart without colour
        ([r for r in runs if r.status == Status.PRUNED], {"marker": "x", "color": "0.5", "s": 18}),
        (scored, {"marker": "o", "color": "C0", "s": 18}),
        ([best], {"marker": "*", "color": "C3", "s": 130}),
    ]
    labels = ("pruned: its best until then", "completed", "best")
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    plt = pyplot()
    figure, grid = plt.subplots(
        lines, columns, figsize=(3 * columns + 1, 2.2 * lines + 0.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, key in zip(grid.flat, keys, strict=False):
        places, log = _places({run.value(key) for group, _ in groups for run in group})
        for (group, look), name in zip(groups, labels, strict=True):
            xs = [places[run.value(key)] for run in group]
            ys = [drawn(ppls.get(id(run), run.summary.get("best_ppl"))) for run in group]
            axes.scatter(xs, ys, label=name if group else None, **look)
        if log:
            axes.set_xscale("log")
        elif all(text.isdigit() for text in places):
            axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        elif any(number(text) == math.inf for text in places):
            numbers = [t for t in places if number(t) < math.inf]
            ends = {min(numbers, key=number), max(numbers, key=number)} if numbers else set()
            shown = [t for t in places if t in ends or t not in numbers]
            axes.set_xticks([places[t] for t in shown], [caption(t) for t in shown])
        axes.set_xlabel(caption(key))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plt.LogFormatter())
        axes.yaxis.set_minor_formatter(plt.LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(alpha=0.3, which="both")
    for axes in grid.flat[len(keys) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel(f"validation ppl ({names[0]})")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), ncols=3, loc="outside upper center")
    save(figure, file)
    return True


def _places(texts: Collection[str]) -> tuple[dict[str, float], bool]:
    """Where values stand on an axis, words after the numbers, and whether it is logarithmic."""
    places = {text: number(text) for text in texts if number(text) < math.inf}
    words = sorted(set(texts) - set(places))
    low, high = min(places.values(), default=0.0), max(places.values(), default=0.0)
    log = not words and low > 0 and (high < 0.1 or high > 1000 * low)  # a rate, not dropout
    step = (high - low) / 8 or 1.0
    return places | {word: high + i * step for i, word in enumerate(words, start=1)}, log
