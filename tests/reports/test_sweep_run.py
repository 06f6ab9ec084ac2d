"""Sweeps as W&B shows them: every run in its group, and the summary run once."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm import load_model
from mogrifier_lm.reports.sweep import Run, ended, locked, read_runs, write_report
from mogrifier_lm.reports.sweep_run import track_sweep
from mogrifier_lm.tracking import read_offline
from tests.test_run import train
from tests.test_tracking import sync
from tests.wandb_stand_in import WandbStandIn

pytestmark = pytest.mark.usefixtures("own_wandb")


def of_sweep(small: list[str], sweep_dir: Path, *overrides: str) -> list[str]:
    base = [o for o in small if not o.startswith("tracker")]
    return ["-m", *base, f"hydra.sweep.dir={sweep_dir}", "tracker.project=p", *overrides]


def ppl(sweep_dir: Path, job: str, split: str) -> float:
    return float(json.loads((sweep_dir / job / "summary.json").read_text())[split]["static"]["ppl"])


def offline(folder: Path) -> list[dict[str, Any]]:
    return [read_offline(path) for path in sorted(folder.glob("wandb/offline-run-*"))]


def test_an_offline_sweep_is_read_back_whole(
    small: list[str], tmp_path: Path, server: WandbStandIn
) -> None:
    sweep_dir = tmp_path / "my-sweep"
    arguments = of_sweep(small, sweep_dir, "tracker.mode=offline", "tracker.tags=[mine]")
    done = train([*arguments, "model.rounds=0,1"], tmp_path)
    assert done.returncode == 0, done.stderr
    for job, rounds in (("0", 0), ("1", 1)):
        (run,) = offline(sweep_dir / job)
        about = run["run"]
        assert (about["run_group"], about["job_type"]) == ("my-sweep", "train")
        assert about["display_name"].endswith(f",rounds={rounds}")
        assert {"mine", "text", "lstm"} <= set(about["tags"])
        assert f"model.rounds={rounds}" in run["config"]["overrides"]
        assert run["config"]["model"]["rounds"] == rounds
        for split in ("valid", "test"):
            assert run["summary"][f"{split}/static/ppl"] == ppl(sweep_dir, job, split)
        rows = (sweep_dir / job / "metrics.jsonl").read_text().splitlines()
        assert [r["row"] for r in run["history"] if "row" in r] == [*range(1, len(rows) + 1)]
        assert any("train/grad_norm" in r for r in run["history"])
    (report,) = offline(sweep_dir / "report")
    assert (report["run"]["run_group"], report["run"]["job_type"]) == ("my-sweep", "report")
    assert report["summary"]["sweep/runs"]["nrows"] == 2
    assert report["summary"]["sweep/plot"]["_type"] == "image-file"
    assert report["summary"]["best_valid_ppl"] == min(ppl(sweep_dir, j, "valid") for j in "01")

    # The same report again: nothing new. One more run: the same W&B run is brought up to date.
    track_sweep(read_runs([sweep_dir]), sweep_dir)
    assert len(list(sweep_dir.glob("report/wandb/offline-run-*"))) == 1
    shutil.copytree(sweep_dir / "1", sweep_dir / "2", ignore=shutil.ignore_patterns("wandb"))
    write_report(read_runs([sweep_dir]), sweep_dir / "report")
    track_sweep(read_runs([sweep_dir]), sweep_dir)
    _, report = offline(sweep_dir / "report")
    assert report["summary"]["sweep/runs"]["nrows"] == 3
    sync(*sorted(sweep_dir.glob("*/wandb/offline-run-*")))
    assert sorted(run["jobType"] for run in server.runs.values()) == ["report"] + 2 * ["train"]
    assert {run["groupName"] for run in server.runs.values()} == {"my-sweep"}
    assert sorted(
        run["summary"]["test/static/ppl"]
        for run in server.runs.values()
        if run["jobType"] == "train"
    ) == sorted(ppl(sweep_dir, job, "test") for job in "01")


def test_an_online_sweep_with_a_failure_and_artifacts(
    small: list[str], tmp_path: Path, server: WandbStandIn
) -> None:
    sweep_dir = tmp_path / "sweep"
    arguments = of_sweep(small, sweep_dir, "tracker.artifacts=true", "model.rounds=1,-1")
    assert train(arguments, tmp_path).returncode == 1
    runs = {run["jobType"]: run for run in server.runs.values()}
    assert len(server.runs) == 2 and set(runs) == {"train", "report"}
    assert runs["train"]["exit"] == 0
    assert (runs["report"]["summary"]["completed"], runs["report"]["summary"]["failed"]) == (1, 1)
    ((_, artifact),) = [
        (name, a) for name, a in server.artifacts.items() if a["artifactTypeName"] == "model"
    ]
    assert json.loads(artifact["metadata"])["test/static/ppl"] == ppl(sweep_dir, "0", "test")
    for name, content in artifact["files"].items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    model = load_model(tmp_path / "downloaded")
    summary = json.loads((tmp_path / "downloaded/summary.json").read_text())
    assert model.num_params() == summary["params"]


def test_a_sweep_has_ended_when_each_run_has() -> None:
    def run(seed: str, status: str, at: float = 0.0) -> Run:
        return Run(dir=Path(seed), overrides={"seed": seed}, summary={"status": status}, ended=at)

    grid = [{"seed": "1"}, {"seed": "2"}]
    completed = run("1", "completed", 5)
    assert ended([completed, run("2", "completed", 15)], grid, 10)
    assert ended([completed, run("2", "failed", 15)], grid, 10)
    assert not ended([completed, run("2", "failed", 5)], grid, 10), "it is going to be run again"
    assert not ended([completed, run("2", "unfinished")], grid, 10)
    assert not ended([completed], grid, 10)
    assert not ended([completed], [], 10), "what a search asks for is not known"


def test_reports_are_written_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def write() -> None:
        with locked(tmp_path / "report"):
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=write) for _ in range(3)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began > 0.14 and not inside
