"""Sweeps on a real SLURM of two nodes: all well, a run killed, a run at its time limit.

python -m pytest -m slurm -s      as root; -s shows what docs/slurm.md records

The cluster is started by cluster.sh, which says what it needs, and ended after the tests.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mogrifier_lm.checkpoint import LAST
from tests.conftest import ROOT
from tests.test_run import metrics
from tests.test_sweep import rows

SCRIPT = Path(__file__).with_name("cluster.sh")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("sinfo"),
        reason=f"needs root and SLURM, see {SCRIPT.relative_to(ROOT)}",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([SCRIPT, "up", folder], check=True, timeout=300)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            # The jobs inherit it: where the package is installed nothing of this is needed.
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("OMP_NUM_THREADS", "1")
            show("sinfo -N")
            yield
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=300)


def show(command: str) -> str:
    """Run a command of SLURM's and print it with what it says."""
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=60, check=True)
    print(f"\n$ {command}\n{done.stdout.rstrip()}")
    return done.stdout


class Sweep:
    """A sweep of tiny runs in a folder of its own, started again by `start`."""

    def __init__(self, cwd: Path, cache_dir: Path, name: str, *overrides: str) -> None:
        self.cwd, self.dir = cwd, cwd / name
        shown = [
            "-m", "hydra/launcher=slurm", "hydra.launcher.partition=test",
            "hydra.launcher.cpus_per_task=1", f"hydra.sweep.dir={name}", "model.hidden_size=12",
            *overrides,
        ]  # fmt: skip
        self.shown = " ".join(["python train.py", *shown])
        own = [f"data.cache_dir={cache_dir}", "tracker=none", "evaluators.static.batch_size=64"]
        self.command = [sys.executable, str(ROOT / "train.py"), *shown, *own]

    def start(self) -> subprocess.Popen[str]:
        print(f"\n$ {self.shown}")
        return subprocess.Popen(self.command, cwd=self.cwd, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)  # fmt: skip

    def end(self, process: subprocess.Popen[str], code: int) -> str:
        """The last line, after the command has ended with this code."""
        output, _ = process.communicate(timeout=400)
        assert process.returncode == code, output
        return output.strip().splitlines()[-1]

    def statuses(self) -> list[str]:
        return [row["status"] for row in rows(self.dir)]

    def log(self) -> str:
        """Of all jobs."""
        return "".join(path.read_text() for path in sorted(self.dir.glob(".submitit/*/*_log.out")))

    def show_report(self) -> None:
        report = self.dir / "report/sweep.md"
        lines = [line for line in report.read_text().splitlines() if line.startswith(("|", "##"))]
        print(f"\n$ grep '^[|#]' {report.relative_to(self.cwd)}\n" + "\n".join(lines))

    def tidy(self, text: str) -> str:
        return text.replace(f"{self.cwd}/", "")


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def queue_is_empty() -> bool:
    return not subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout


def process_of(index: int) -> int:
    """The process, on its node, of a job of the array that runs now."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            arguments = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if (
            f"SLURM_CONF={os.environ['SLURM_CONF']}".encode() in environment
            and f"SLURM_ARRAY_TASK_ID={index}".encode() in environment
            and b"python" in arguments[0]
            and b"submitit.core._submit" in arguments
        ):
            return int(path.name)
    raise AssertionError(f"no process of job {index}")


def test_a_sweep_over_two_nodes(cluster: None, cache_dir: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, cache_dir, "clean", "model.rounds=0,2", "seed=1,2",
                  "trainer.max_steps=100", "trainer.valid_every=50")  # fmt: skip
    sweep.end(sweep.start(), 0)
    until(queue_is_empty)
    assert sweep.statuses() == ["completed"] * 4
    accounts = show("sacct -X -o JobID,State,ExitCode,NodeList")
    assert "n1" in accounts and "n2" in accounts
    sweep.show_report()


def test_a_killed_run_goes_on_by_the_same_command(
    cluster: None, cache_dir: Path, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cache_dir, "killed", "model.rounds=0,2", "seed=1,2",
                  "trainer.max_epochs=null", "trainer.max_steps=1500", "trainer.valid_every=500",
                  "trainer.checkpoint_minutes=0.01")  # fmt: skip
    process = sweep.start()
    until((sweep.dir / "1" / LAST).is_file)
    show("squeue -o %i,%j,%t,%N")
    os.kill(process_of(1), signal.SIGKILL)
    last = sweep.end(process, 1)
    print(sweep.tidy(last))
    assert last.startswith("error: job ") and "(state: FAILED)" in last
    until(queue_is_empty)
    show("sacct -X -o JobID,State,ExitCode,NodeList")
    sweep.show_report()
    assert sweep.statuses() == ["completed", "unfinished", "completed", "completed"]
    assert "going on" not in sweep.log()

    sweep.end(sweep.start(), 0)
    until(queue_is_empty)
    sweep.show_report()
    assert sweep.statuses() == ["completed"] * 4
    assert sweep.log().count("is completed: skipped") >= 3
    steps = [line["step"] for line in metrics(sweep.dir / "1") if "valid/ppl" in line]
    assert "going on after step" in sweep.log() and steps == [500, 1000, 1500]


def test_a_run_at_its_time_limit_is_queued_again(
    cluster: None, cache_dir: Path, tmp_path: Path
) -> None:
    # One minute is SLURM's least; its signal may come up to a minute before it was asked for.
    def limited(name: str, *overrides: str) -> Sweep:
        return Sweep(tmp_path, cache_dir, name, "model.rounds=0,", "hydra.launcher.timeout_min=1",
                     "hydra.launcher.signal_delay_s=15", "trainer.max_minutes=0.75",
                     "trainer.max_epochs=10000", "trainer.valid_every=500",
                     "trainer.checkpoint_minutes=0.02", *overrides)  # fmt: skip

    again = limited("limit", "hydra.launcher.max_num_timeout=5")
    once = limited("limit_once", "hydra.launcher.max_num_timeout=0")
    both = again.start(), once.start()

    last = once.end(both[1], 1)
    print(once.tidy(last))
    assert last == "error: limit_once/0: Job not requeued because: timed-out too many times."
    assert once.statuses() == ["failed"]

    until(lambda: "REQUEUED" in show("sacct -X -D -o JobID,State,NodeList"))
    summary = json.loads((again.dir / "0/summary.json").read_text())
    print(f"\n$ cat limit/0/summary.json\n{json.dumps(summary, indent=2)}")
    assert summary["status"] == "interrupted" and "time limit" in summary["error"]
    again.end(both[0], 0)
    assert again.statuses() == ["completed"]
    again.show_report()
    for line in again.log().splitlines():
        if any(words in line for words in ("Requeued", "going on after", "training ended")):
            print(line.split(" - ")[-1])
    restarts = again.log().count("going on after step")
    assert restarts >= 1 and again.log().count("Starting with JobEnvironment") == restarts + 1
    lines = metrics(again.dir / "0")
    steps = [line["step"] for line in lines if "valid/ppl" in line]
    assert steps == sorted(set(steps)), "a step is written once"
    seconds = json.loads((again.dir / "0/summary.json").read_text())["seconds"]
    assert 45 <= seconds < 60, "the time of all parts together"

    once.end(once.start(), 0)
    until(queue_is_empty)
    assert once.statuses() == ["completed"] and "going on after step" in once.log()
    show("sacct -X -D -o JobID,State,ExitCode,NodeList,Elapsed")
