"""The tracker against the real client and a loopback server: nothing it does may stop a run."""

import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm.config import save_config, validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.tracked import tracked_run
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking import tracker as tracking
from mogrifier_lm.tracking.names import short_name
from mogrifier_lm.tracking.offline import read_offline
from mogrifier_lm.tracking.tracker import Tracker, build_tracker
from tests.conftest import ROOT, compose_config
from tests.wandb_stand_in import API_KEY, WandbStandIn

pytest.importorskip("wandb")

pytestmark = pytest.mark.usefixtures("own_wandb")


def build(run_dir: Path, **changes: Any) -> Tracker:
    settings: dict[str, Any] = {
        "kind": "wandb",
        "mode": "auto",
        "project": "p",
        "entity": None,
        "config": {"model": {"rounds": 5}},
        "group": "sweep-1",
        "name": "model.rounds=5",
        "tags": ["ptb", "mogrifier"],
    }
    return build_tracker(folder=run_dir, rows=RunFolder(run_dir).rows(), **(settings | changes))


def row(step: int) -> dict[str, float]:
    return {"step": step, "epoch": 1, "tokens": 700 * step, "seconds": 2.0, "train/ppl": 9.0 / step}


def offline(run_dir: Path) -> list[dict[str, Any]]:
    """What wandb's own reader finds in the offline runs below run_dir, oldest first."""
    return [read_offline(path) for path in sorted(run_dir.glob("wandb/offline-run-*"))]


def sync(*arguments: object) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def write_metrics(run_dir: Path, steps: range) -> None:
    """metrics.jsonl as it is after a checkpoint."""
    text = "".join(json.dumps(row(step)) + "\n" for step in steps)
    run_dir.joinpath("metrics.jsonl").write_text(text)


def test_import_of_tracking_leaves_wandb_alone() -> None:
    code = "import sys, mogrifier_lm.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_online(server: WandbStandIn, tmp_path: Path) -> None:
    with build(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.log(row(step))
        tracker.summary({"status": "completed", "valid": {"static": {"ppl": 3.5}}})
    assert tracker.run_id is not None
    run = server.runs[tracker.run_id]
    assert (run["groupName"], run["jobType"], run["project"]) == ("sweep-1", "train", "p")
    assert run["displayName"] == "model.rounds=5"
    assert run["tags"] == ["ptb", "mogrifier"]
    assert run["config"]["model"]["value"] == {"rounds": 5}
    assert [r.get("tokens") for r in run["history"]] == [700, 1400, 2100, None]
    assert run["summary"]["valid/static/ppl"] == 3.5
    assert run["summary"]["status"] == "completed"
    assert run["exit"] == 0
    assert [r.get("row") for r in run["history"]] == [1, 2, 3, None]
    defined = {m.get("1") or m.get("2"): m for m in run["config"]["_wandb"]["value"]["m"]}
    assert {"step", "epoch", "tokens", "seconds", "train/*", "valid/*"} <= set(defined)


@pytest.mark.parametrize("sent", [2, 5], ids=["rows lost", "rows done again"])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_resume_keeps_every_row_once(
    server: WandbStandIn, tmp_path: Path, mode: str, sent: int
) -> None:
    """The first part was killed after `sent` rows had left it, the last checkpoint at row 3."""
    with build(tmp_path, mode=mode) as first:
        for step in range(1, sent + 1):
            first.log(row(step))
    write_metrics(tmp_path, range(1, 4))
    with build(tmp_path, mode=mode, run_id=first.run_id) as second:
        for step in range(4, 8):
            second.log(row(step))
        second.summary({"valid": {"static": {"ppl": 3.5}}})
    assert first.run_id == second.run_id
    if mode == "offline":
        sync(*sorted(tmp_path.glob("wandb/offline-run-*")))
    (run,) = server.runs.values()
    rows = [r for r in run["history"] if "row" in r]
    assert [r["step"] for r in rows] == [r["row"] for r in rows] == list(range(1, 8))
    assert run["summary"]["valid/static/ppl"] == 3.5


def test_rows_of_a_part_without_wandb_are_sent(server: WandbStandIn, tmp_path: Path) -> None:
    write_metrics(tmp_path, range(1, 4))
    with build(tmp_path) as tracker:
        tracker.log(row(4))
    (run,) = server.runs.values()
    assert [r["step"] for r in run["history"]] == [1, 2, 3, 4]


def test_an_agent_of_a_wandb_sweep_finds_its_run(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    build(tmp_path).close()
    assert server.runs["theirs"]["sweep"] == "abc"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_model_is_an_artifact(server: WandbStandIn, tmp_path: Path, mode: str) -> None:
    file = Path("checkpoints/best/model.safetensors")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(b"weights")
    (tmp_path / "summary.json").write_text("{}")
    with build(tmp_path, mode=mode) as tracker:
        tracker.log_model(
            tmp_path, [file, Path("summary.json")], {"valid": {"static": {"ppl": 3.5}}}
        )
    if mode == "offline":
        assert not server.artifacts
        sync(*tmp_path.glob("wandb/offline-run-*"))
    artifact = server.artifacts[f"model-{tracker.run_id}"]
    assert artifact["committed"] and artifact["artifactTypeName"] == "model"
    assert json.loads(artifact["metadata"]) == {"valid/static/ppl": 3.5}
    assert artifact["files"][str(file)] == b"weights"
    assert artifact["files"]["summary.json"] == b"{}"


def test_runs_of_one_process_are_distinct(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")  # of a process around: not all jobs of a multirun
    first = build(tmp_path / "0")
    first.log(row(1))
    second = build(tmp_path / "1", config={"model": {"rounds": 6}})  # the first was never closed
    second.log(row(2))
    second.close()
    first.close()
    assert first.run_id is not None and second.run_id is not None
    assert len(server.runs) == 2
    assert [r["step"] for r in server.runs[first.run_id]["history"]] == [1]
    assert server.runs[second.run_id]["config"]["model"]["value"] == {"rounds": 6}


def test_an_exception_closes_the_run_as_failed(server: WandbStandIn, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), build(tmp_path) as tracker:
        raise RuntimeError
    assert tracker.run_id is not None
    assert server.runs[tracker.run_id]["exit"] == 1


def test_auto_without_a_key_is_offline_and_readable(tmp_path: Path) -> None:
    with build(tmp_path) as tracker:
        tracker.log(row(1))
        tracker.log(row(2))
        tracker.summary({"test": {"dynamic": {"ppl": 2.5}}})
    tracker.close()  # again
    (found,) = offline(tmp_path)
    assert [r.get("step") for r in found["history"]] == [1, 2, None]
    assert (found["run"]["run_group"], found["run"]["job_type"]) == ("sweep-1", "train")
    assert found["summary"]["test/dynamic/ppl"] == 2.5
    assert found["config"]["model"]["rounds"] == 5
    assert found["state"] == "finished"


def test_an_image_is_kept(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    image.save(tmp_path / "curves.png")
    with build(tmp_path) as tracker:
        tracker.log_image("curves", tmp_path / "curves.png")
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_wandb_mode_decides_for_auto_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert build(tmp_path, run_id="abc").run_id is None
    assert not tmp_path.joinpath("wandb").exists()
    with build(tmp_path, mode="offline"):
        pass
    assert list(tmp_path.glob("wandb/offline-run-*"))
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes"):
        build(tmp_path)


def test_mode_online_is_stronger_than_wandb_mode(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with build(tmp_path, mode="online") as tracker:
        pass
    assert tracker.run_id in server.runs


def test_netrc_counts_as_an_account(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    host = server.url.removeprefix("http://")
    netrc.write_text(f"machine {host} login user password {API_KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with build(tmp_path) as tracker:
        pass
    assert tracker.run_id in server.runs


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "online"}, "wandb login"),
        ({"mode": "sometimes"}, "sometimes"),
        ({"kind": "mlflow"}, "mlflow"),
        ({"mode": "offline", "project": "a/b"}, "refuses"),
        ({"mode": "offline", "tags": ["t" * 80]}, "between 1 and 64"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        build(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_dead_server_at_the_start_means_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 2.0)  # nothing listens on the fixture's port
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    start = time.perf_counter()
    with build(tmp_path) as tracker:
        tracker.log(row(1))
    assert time.perf_counter() - start < 2.0 + 30.0  # wandb would wait 90 s
    ours = [r for r in caplog.records if r.name == tracking.__name__]
    assert [r.levelname for r in ours if r.levelno >= logging.WARNING] == ["WARNING"]
    assert list(tmp_path.glob(f"wandb/offline-run-*-{tracker.run_id}/*.wandb"))


def test_a_rejected_key_means_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with WandbStandIn(reject_key=True) as stand_in:
        monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        build(tmp_path).close()
    assert "cannot start online" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_server_that_dies_blocks_nothing(
    server: WandbStandIn,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 2.0)
    tracker = build(tmp_path)
    tracker.log(row(1))
    server.stop()
    start = time.perf_counter()
    for step in range(2, 500):
        tracker.log(row(step))
    assert time.perf_counter() - start < 10.0  # and not a time-out for each of 498 rows
    tracker.summary({"test": {"ppl": 4.5}})
    tracker.close()
    assert time.perf_counter() - start < 2.0 + 30.0  # wandb would wait for ever
    with WandbStandIn() as later:  # what the warning says to do brings every row
        monkeypatch.setenv("WANDB_BASE_URL", later.url)
        sync(*shlex.split(caplog.messages[-1].partition("upload it with: wandb sync ")[2]))
    assert tracker.run_id is not None
    rows = [r["step"] for r in later.runs[tracker.run_id]["history"] if "row" in r]
    assert rows == list(range(1, 500))
    assert later.runs[tracker.run_id]["summary"]["test/ppl"] == 4.5


def test_training_goes_on_without_its_server(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, small: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 2.0)
    log = Tracker.log

    def stop_at_third(tracker: Tracker, metrics: Mapping[str, float]) -> None:
        if len(tmp_path.joinpath("metrics.jsonl").read_text().splitlines()) == 3:
            server.stop()
        log(tracker, metrics)

    monkeypatch.setattr(Tracker, "log", stop_at_third)
    config = validate(compose_config([*small, "tracker=wandb", "tracker.mode=online"]))
    began = time.perf_counter()
    tracked_run(config, RunFolder(tmp_path), [])
    assert time.perf_counter() - began < 60  # of which 2 wait for the server
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "completed"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12
    with WandbStandIn() as later:
        monkeypatch.setenv("WANDB_BASE_URL", later.url)
        sync("--include-online", *tmp_path.glob("wandb/run-*"))
    (seen,) = later.runs.values()
    assert [r["step"] for r in seen["history"] if "row" in r] == [r["step"] for r in rows]
    assert seen["summary"]["test/static/ppl"] == summary["test"]["static"]["ppl"]


def test_a_run_cut_before_its_first_validation_keeps_its_id(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate(compose_config([*small, "tracker=wandb", "tracker.mode=offline"]))
    save_config(config, RunFolder(tmp_path).config)

    def cut(tracker: Tracker, metrics: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tracker, "log", cut)
        tracked_run(config, RunFolder(tmp_path), [])
    tracked_run(config, RunFolder(tmp_path), [])
    parts = [folder.name for folder in tmp_path.glob("wandb/offline-run-*")]
    assert len(parts) == 2 and len({name.split("-")[3] for name in parts}) == 1, parts


KILL_THE_SERVICE = """
import os, signal, sys, time
from pathlib import Path
from tests.tracking.test_tracker import build, row

folder = Path(sys.argv[1])
tracker = build(folder / "0")
for children in Path("/proc/self/task").glob("*/children"):
    for child in children.read_text().split():
        if Path(f"/proc/{child}/comm").read_text().startswith("wandb-core"):
            os.kill(int(child), signal.SIGKILL)
for step in range(20):
    tracker.log(row(step + 1))
    time.sleep(0.01)
tracker.close()
with build(folder / "1") as following:
    following.log(row(1))
print(following.run_id)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the service in /proc")
def test_a_killed_service_stops_neither_this_run_nor_the_next(
    server: WandbStandIn, tmp_path: Path
) -> None:
    # In a process of its own: wandb does not wait for a service that was killed, and the warning
    # about that would hit whichever test is running when the garbage is collected.
    command = [sys.executable, "-c", KILL_THE_SERVICE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "W&B misses metrics of this run" in done.stderr
    assert [r["step"] for r in server.runs[done.stdout.strip()]["history"]] == [1]


class BrokenRun:
    """A W&B run of which every call fails."""

    id = "abc"
    settings = type("Settings", (), {"sync_dir": "folder"})
    summary: dict[str, Any] = {}

    def log(self, _: object) -> None:
        raise ConnectionResetError("Connection lost")

    def finish(self, exit_code: int) -> None:
        raise ConnectionResetError("Connection lost")


def test_a_failing_log_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(BrokenRun())
    tracker.log(row(1))
    tracker.log(row(2))
    tracker.close()
    assert [r.message for r in caplog.records] == [
        "W&B misses metrics of this run: Connection lost",
        "W&B has not got all of this run (Connection lost); upload it with: "
        "wandb sync --include-online folder",
    ]


def test_without_wandb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        tracker = build(tmp_path)
        assert tracker.run_id is None
        assert [r.message for r in caplog.records] == [
            "wandb is not installed: the run is not tracked by W&B; "
            f"its files in {tmp_path} are complete"
        ]
        for mode in ("online", "offline"):
            with pytest.raises(UserError, match="not installed"):
                build(tmp_path, mode=mode)
        build(tmp_path, mode="disabled")


@pytest.mark.parametrize("changes", [{"kind": "none"}, {"mode": "disabled"}])
def test_no_tracker_takes_every_call(tmp_path: Path, changes: dict[str, Any]) -> None:
    with build(tmp_path, **changes) as tracker:
        tracker.log(row(1))
        tracker.log_image("curves", tmp_path / "missing.png")
        tracker.summary({"status": "completed"})
    tracker.close()
    assert tracker.run_id is None
    assert not list(tmp_path.iterdir())


def test_names_are_short_and_tell_runs_apart() -> None:
    assert short_name(["model.rounds=3", "model.hidden_size=200", "seed=1", "tracker=none"]) == (
        "rounds=3,hidden_size=200,seed=1"
    )
    overrides = ["sweep=rounds", "data=ptb", "data.dir=/text", "model.seed=1", "seed=2", "+a.b=3"]
    assert short_name(overrides) == "data=ptb,model.seed=1,seed=2,b=3"
    assert short_name([]) == ""
