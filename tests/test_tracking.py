"""The tracker against the real client and a loopback server: nothing it does may stop a run."""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm import tracking
from mogrifier_lm.errors import UserError
from mogrifier_lm.tracking import Tracker, build_tracker
from tests.wandb_stand_in import API_KEY, WandbStandIn

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, settings or WANDB_ variables of the user; a new wandb session for each test."""
    from wandb.sdk.lib import wbauth

    for name in [*os.environ]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    with WandbStandIn() as stand_in:
        monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        yield stand_in


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
    return build_tracker(run_dir=run_dir, **(settings | changes))


def row(step: int) -> dict[str, float]:
    return {"step": step, "epoch": 1, "tokens": 700 * step, "seconds": 2.0, "train/ppl": 9.0 / step}


def inspect(run_dir: Path, *options: str) -> str:
    """What wandb's own reader finds in the only offline run below run_dir."""
    (folder,) = run_dir.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
    assert [r["tokens"] for r in run["history"]] == [700, 1400, 2100]
    assert run["summary"]["valid/static/ppl"] == 3.5
    assert run["summary"]["status"] == "completed"
    assert run["exit"] == 0
    assert {m.get("1") or m.get("2") for m in run["config"]["_wandb"]["value"]["m"]} >= {
        "tokens",
        "*",
    }


def test_resume_appends_to_the_same_run(server: WandbStandIn, tmp_path: Path) -> None:
    with build(tmp_path / "a") as first:
        first.log(row(1))
        first.log(row(2))
    with build(tmp_path / "a", run_id=first.run_id) as second:
        second.log(row(2))  # done again, as after a checkpoint older than the last row
        second.log(row(3))
    assert second.run_id == first.run_id
    (run,) = server.runs.values()
    assert [r["step"] for r in run["history"]] == [1, 2, 2, 3]


def test_runs_of_one_process_are_distinct(server: WandbStandIn, tmp_path: Path) -> None:
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
    records = [json.loads(line) for line in inspect(tmp_path).splitlines()]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [r["step"] for r in rows] == [1, 2]
    assert '"sweep-1"' in inspect(tmp_path)
    head = json.loads(inspect(tmp_path, "--summary"))
    assert head["summary"]["test/dynamic/ppl"] == 2.5
    assert head["config"]["model"]["rounds"] == 5


def test_an_image_is_kept(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    image.save(tmp_path / "curves.png")
    with build(tmp_path) as tracker:
        tracker.log_image("curves", tmp_path / "curves.png")
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_wandb_mode_decides_for_auto_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert build(tmp_path, run_id="abc").run_id == "abc"
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
    assert time.perf_counter() - start < 2.0 + 5.0
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
    assert time.perf_counter() - start < 2.0
    tracker.summary({"test": {"ppl": 4.5}})
    tracker.close()
    assert time.perf_counter() - start < 2.0 + 5.0
    with WandbStandIn() as later:  # what the warning says to do brings every row
        monkeypatch.setenv("WANDB_BASE_URL", later.url)
        advice = shlex.split(caplog.messages[-1].partition("upload it with: wandb ")[2])
        subprocess.run([sys.executable, "-m", "wandb", *advice], check=True, capture_output=True)
    assert tracker.run_id is not None
    assert [r["step"] for r in later.runs[tracker.run_id]["history"]] == list(range(1, 500))
    assert later.runs[tracker.run_id]["summary"]["test/ppl"] == 4.5


KILL_THE_SERVICE = """
import os, signal, sys, time
from pathlib import Path
from tests.test_tracking import build, row

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
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
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
        tracker = build(tmp_path, run_id="abc")
        assert tracker.run_id == "abc"
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
