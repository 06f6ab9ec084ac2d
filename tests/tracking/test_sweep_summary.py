"""Sweeps as W&B shows them: every run in its group, and the summary run once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm import load_model
from mogrifier_lm.config import save_config, validate
from mogrifier_lm.launch.tracked import tracked_run
from mogrifier_lm.reports.folders import Run, ended, read_runs
from mogrifier_lm.reports.report import write_report
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking.offline import read_offline
from mogrifier_lm.tracking.sweep_summary import track_sweep
from tests.conftest import compose_config
from tests.runs.test_run import train
from tests.tracking.test_tracker import sync
from tests.wandb_stand_in import WandbStandIn

pytestmark = pytest.mark.usefixtures("own_wandb")


def of_sweep(small: list[str], sweep_dir: Path, *overrides: str) -> list[str]:
    base = [o for o in small if not o.startswith("tracker")]
    return ["-m", *base, f"hydra.sweep.dir={sweep_dir}", "tracker.project=p", *overrides]


def ppl(sweep_dir: Path, job: str, split: str) -> float:
    return float(json.loads((sweep_dir / job / "summary.json").read_text())[split]["static"]["ppl"])


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    return [read_offline(path) for path in sorted(folder.glob("wandb/offline-run-*"))]


def test_an_offline_sweep_is_read_back_whole(
    small: list[str], tmp_path: Path, server: WandbStandIn
) -> None:
    sweep_dir = tmp_path / "my-sweep"
    arguments = of_sweep(small, sweep_dir, "tracker.mode=offline", "tracker.tags=[mine]")
    done = train([*arguments, "model.rounds=0,1,-1"], tmp_path)
    assert done.returncode == 1, done.stderr
    for job, rounds in (("0", 0), ("1", 1)):
        (found,) = offline_runs(sweep_dir / job)
        about = found["run"]
        assert (about["run_group"], about["job_type"]) == ("my-sweep", "train")
        assert about["display_name"].endswith(f",rounds={rounds}")
        assert {"mine", "text", "lstm"} <= set(about["tags"])
        assert f"model.rounds={rounds}" in found["config"]["overrides"]
        assert found["config"]["model"]["rounds"] == rounds
        for split in ("valid", "test"):
            assert found["summary"][f"{split}/static/ppl"] == ppl(sweep_dir, job, split)
        rows = (sweep_dir / job / "metrics.jsonl").read_text().splitlines()
        assert [r["row"] for r in found["history"] if "row" in r] == [*range(1, len(rows) + 1)]
        assert any("train/grad_norm" in r for r in found["history"])
    (report,) = offline_runs(sweep_dir / "report")
    assert (report["run"]["run_group"], report["run"]["job_type"]) == ("my-sweep", "report")
    assert report["summary"]["sweep/runs"]["nrows"] == 3
    assert (report["summary"]["completed"], report["summary"]["failed"]) == (2, 1)
    assert report["summary"]["sweep/plot"]["_type"] == "image-file"
    assert report["summary"]["best_valid_ppl"] == min(ppl(sweep_dir, j, "valid") for j in "01")

    # The same report again: nothing new. One more run: the same W&B run is brought up to date.
    track_sweep(read_runs([sweep_dir]), sweep_dir)
    assert len(list(sweep_dir.glob("report/wandb/offline-run-*"))) == 1
    shutil.copytree(sweep_dir / "1", sweep_dir / "3", ignore=shutil.ignore_patterns("wandb"))
    write_report(read_runs([sweep_dir]), sweep_dir / "report")
    track_sweep(read_runs([sweep_dir]), sweep_dir)
    assert len(list(sweep_dir.glob("report/wandb/offline-run-*"))) == 2
    sync(*sorted(sweep_dir.glob("*/wandb/offline-run-*")))
    (of_report,) = [run for run in server.runs.values() if run["jobType"] == "report"]
    assert of_report["summary"]["completed"] == 3
    assert sorted(run["jobType"] for run in server.runs.values()) == ["report"] + 2 * ["train"]
    assert {run["groupName"] for run in server.runs.values()} == {"my-sweep"}
    assert sorted(
        run["summary"]["test/static/ppl"]
        for run in server.runs.values()
        if run["jobType"] == "train"
    ) == sorted(ppl(sweep_dir, job, "test") for job in "01")


def test_the_model_of_a_run_is_an_artifact_that_loads(
    small: list[str], tmp_path: Path, server: WandbStandIn
) -> None:
    options = ["tracker=wandb", "tracker.mode=online", "tracker.artifacts=true"]
    config = validate(compose_config([*small, *options]))
    save_config(config, RunFolder(tmp_path).config)
    tracked_run(config, RunFolder(tmp_path), [])
    (artifact,) = server.artifacts.values()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert json.loads(artifact["metadata"])["test/static/ppl"] == summary["test"]["static"]["ppl"]
    for name, content in artifact["files"].items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert load_model(tmp_path / "downloaded").num_params() == summary["params"]
    assert json.loads((tmp_path / "downloaded/summary.json").read_text()) == summary


def test_a_sweep_has_ended_when_each_run_has() -> None:
    def of(seed: str, status: str, at: float = 0.0) -> Run:
        return Run(
            folder=RunFolder(seed),
            overrides={"seed": seed},
            summary={"status": status},
            ended=at,
        )

    grid = [{"seed": "1"}, {"seed": "2"}]
    completed = of("1", "completed", 5)
    assert ended([completed, of("2", "completed", 15)], grid, 10)
    assert ended([completed, of("2", "failed", 15)], grid, 10)
    assert not ended([completed, of("2", "failed", 5)], grid, 10), "it is going to be run again"
    assert not ended([completed, of("2", "unfinished")], grid, 10)
    assert not ended([completed], grid, 10)
    assert not ended([completed], [], 10), "what a search asks for is not known"
