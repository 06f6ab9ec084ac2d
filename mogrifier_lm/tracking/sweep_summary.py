"""The summary run of a sweep in W&B: its table and its plot beside the runs, in their group."""

import hashlib
import math
from pathlib import Path
from typing import Any

from mogrifier_lm.config import load_config
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.reports.folders import Runs, completed, evaluators, mean_sd, number
from mogrifier_lm.reports.sweep import run_table
from mogrifier_lm.reports.sweep_plots import series
from mogrifier_lm.runs.folder import REPORT, RunFolder, Status
from mogrifier_lm.tracking.names import cut, sweep_name, tags, wished
from mogrifier_lm.tracking.tracker import build_tracker


def track_sweep(runs: Runs, sweep_dir: Path) -> None:
    """Log a sweep that has ended, as the tracker of its runs says.

    Once: the same report is not logged again, and one that a continued sweep has changed goes to
    the same W&B run, whose id report/wandb.json keeps.

    Args:
        runs: of the sweep.
        sweep_dir: its folder, its report written. W&B's files go to report/wandb.
    """
    folder, done = sweep_dir / REPORT, completed(runs)
    if not done:
        return
    digest = hashlib.sha256((folder / "sweep.csv").read_bytes()).hexdigest()
    state = RunFolder(folder).wandb  # as that of a run
    known = read_json(state, {"run_id": str})
    if known.get("sweep.csv") == digest:
        return
    name = sweep_name(sweep_dir)
    t = load_config(done[0].folder.config).tracker
    overrides = [f"{key}={value}" for key, value in done[0].overrides.items()]
    tracker = build_tracker(
        kind=t.name,
        mode=t.mode,
        project=wished("WANDB_PROJECT", "tracker.project", t.project, overrides) or t.project,
        entity=t.entity,
        folder=folder,
        config={"sweep": name},
        group=cut(t.group or name),
        name=cut(f"{name} report"),
        tags=tags(t.tags, overrides),
        job_type="report",
        run_id=known.get("run_id"),
    )
    if tracker.run_id:  # kept before anything is logged: a cut leaves no second run
        write_json(state, {"run_id": tracker.run_id})
    with tracker:
        table = run_table(runs)
        tracker.log_table("sweep/runs", [{k: _cell(v) for k, v in row.items()} for row in table])
        names = evaluators(runs)
        if names:
            tracker.log_image("sweep/plot", folder / "sweep.png")
        x_key, lines = series(runs)
        if names and x_key and not runs.study:  # of a search each run is a line
            means = {
                label: [
                    (x, mean_sd([run.ppl("valid", names[0]) for run in at])[0]) for x, at in line
                ]
                for label, line in lines.items()
            }
            title = f"validation perplexity ({names[0]}), mean over seeds"
            tracker.log_lines("sweep/perplexity", means, title, x_key)
        best = min(done, key=lambda run: run.ppl("valid", names[0])) if names else done[0]
        tracker.summary(
            {
                "completed": len(done),
                "failed": sum(run.status == Status.FAILED for run in runs),
                "best_run": best.folder.path.name,
                "best_valid_ppl": best.ppl("valid", names[0]) if names else math.nan,
            }
        )
    if tracker.run_id:
        write_json(state, {"run_id": tracker.run_id, "sweep.csv": digest})


def _cell(value: Any) -> Any:
    """A cell of sweep.csv as W&B takes it: a number where it is one, None where it is empty."""
    figure = number(value)
    return None if value == "" else figure if figure < math.inf else value
