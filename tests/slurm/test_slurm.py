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
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import ROOT
from tests.launch.test_sweep import rows
from tests.runs.test_run import metrics

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
    """A sweep of tiny runs in the folder `name` of `cwd`."""

    def __init__(self, cwd: Path, cache_dir: Path, name: str, *overrides: str) -> None:
        self.cwd, self.dir = cwd, cwd / name
        self.process: subprocess.Popen[str] | None = None
        launcher = ["hydra/launcher=slurm", "hydra.launcher.partition=test",
                    "hydra.launcher.cpus_per_task=1"]  # fmt: skip
        shown = ["-m", *launcher, f"hydra.sweep.dir={name}", "model.hidden_size=12", *overrides]
        self.shown = " ".join(["python train.py", *shown])
        own = [f"data.cache_dir={cache_dir}", "tracker=none", "evaluators.static.batch_size=64"]
        self.command = [sys.executable, str(ROOT / "train.py"), *shown, *own]

    def start(self) -> None:
        lines = textwrap.wrap(self.shown, 96, break_on_hyphens=False, break_long_words=False)
        print("\n$ " + " \\\n    ".join(lines))
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(self.command, cwd=self.cwd, text=True, **pipes)

    def end(self, code: int) -> str:
        """The last line, after the command has ended with this code."""
        assert self.process
        output, _ = self.process.communicate(timeout=400)
        assert self.process.returncode == code, output
        last = output.strip().splitlines()[-1].replace(f"{self.cwd}/", "")
        if code:
            print(last)
        return last

    def statuses(self) -> list[str]:
        return [row["status"] for row in rows(self.dir)]

    def log(self) -> str:
        """Of all jobs."""
        return "".join(path.read_text() for path in sorted(self.dir.glob(".submitit/*/*_log.out")))

    def accounts(self) -> str:
        """What SLURM has noted of the jobs of the last command."""
        job = max(int(path.name.partition("_")[0]) for path in self.dir.glob(".submitit/[0-9]*"))
        return show(f"sacct -X -D -j {job} -o JobID,State,ExitCode,NodeList,Elapsed")

    def show_report(self) -> None:
        report = self.dir / "report/sweep.md"
        lines = [line for line in report.read_text().splitlines() if line.startswith(("|", "##"))]
        print(f"\n$ grep '^[|#]' {report.relative_to(self.cwd)}\n" + "\n".join(lines))


NewSweep = Callable[..., Sweep]


@pytest.fixture
def new_sweep(cluster: None, cache_dir: Path, tmp_path: Path) -> Iterator[NewSweep]:
    """Makes sweeps, and ends their commands after a test that has failed."""
    made = []

    def new(name: str, *overrides: str) -> Sweep:
        made.append(Sweep(tmp_path, cache_dir, name, *overrides))
        return made[-1]

    yield new
    for sweep in made:
        if sweep.process and sweep.process.poll() is None:
            sweep.process.kill()
            sweep.process.communicate()


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


def test_a_sweep_over_two_nodes(new_sweep: NewSweep) -> None:
    sweep = new_sweep("clean", "model.rounds=0,2", "seed=1,2", "trainer.max_steps=100",
                      "trainer.valid_every=50")  # fmt: skip
    sweep.start()
    sweep.end(0)
    until(queue_is_empty)
    assert sweep.statuses() == ["completed"] * 4
    accounts = sweep.accounts()
    assert "n1" in accounts and "n2" in accounts
    sweep.show_report()


def test_a_killed_run_goes_on_by_the_same_command(new_sweep: NewSweep) -> None:
    sweep = new_sweep("killed", "model.rounds=0,2", "seed=1,2", "trainer.max_epochs=null",
                      "trainer.max_steps=1500", "trainer.valid_every=500",
                      "trainer.checkpoint_minutes=0.01")  # fmt: skip
    sweep.start()
    until(RunFolder(sweep.dir / "1").last.is_file)
    show("squeue -o %i,%j,%t,%N")
    process = process_of(1)
    print(f"\n$ kill -KILL {process}")
    os.kill(process, signal.SIGKILL)
    last = sweep.end(1)
    assert last.startswith("error: job ") and "(state: FAILED)" in last
    until(queue_is_empty)
    sweep.accounts()
    sweep.show_report()
    assert sweep.statuses() == ["completed", "unfinished", "completed", "completed"]
    assert "going on" not in sweep.log()

    sweep.start()
    sweep.end(0)
    until(queue_is_empty)
    sweep.accounts()
    sweep.show_report()
    assert sweep.statuses() == ["completed"] * 4
    assert "going on after step" in sweep.log()
    assert sweep.log().count("is completed: skipped") >= 3
    steps = [line["step"] for line in metrics(sweep.dir / "1") if "valid/ppl" in line]
    assert steps == [500, 1000, 1500]


def test_a_run_at_its_time_limit_is_queued_again(new_sweep: NewSweep) -> None:
    # One minute is SLURM's least; its signal may come up to a minute before it was asked for.
    limits = ["trainer.max_epochs=10000", "trainer.max_minutes=0.75", "trainer.valid_every=500",
              "trainer.checkpoint_minutes=0.02", "hydra.launcher.timeout_min=1",
              "hydra.launcher.signal_delay_s=15"]  # fmt: skip
    again = new_sweep("limit", "model.rounds=0", *limits, "hydra.launcher.max_num_timeout=5")
    once = new_sweep("once", "model.rounds=0", *limits, "hydra.launcher.max_num_timeout=0")
    again.start()
    once.start()

    assert once.end(1) == "error: once/0: Job not requeued because: timed-out too many times."
    assert once.statuses() == ["failed"]

    summary = again.dir / "0/summary.json"
    until(summary.is_file)
    assert json.loads(summary.read_text())["status"] == "interrupted"
    assert "time limit" in json.loads(summary.read_text())["error"]
    print(f"\n$ cat limit/0/summary.json\n{summary.read_text().strip()}")
    show("squeue -o %i,%t,%r")
    again.end(0)
    until(queue_is_empty)
    again.accounts()
    words = ("[0] Requeued", "[0] going on", "[0] training ended")
    lines = [line for line in again.log().splitlines() if line.startswith(words)]
    print(
        "\n$ grep -E '^.0. (Requeued|going on|training ended)' limit/.submitit/*/*_log.out",
        *lines,
        sep="\n",
    )
    again.show_report()
    assert again.statuses() == ["completed"]
    restarts = again.log().count("going on after step")
    # A warning may come before the first step has ended: that part is begun anew.
    requeued = again.log().count("[0] Requeued job")
    assert requeued >= restarts >= 1, again.log()
    assert again.log().count("Starting with JobEnvironment") == requeued + 1
    steps = [line["step"] for line in metrics(again.dir / "0") if "valid/ppl" in line]
    assert steps == sorted(set(steps)), "each validation is there once"
    seconds = json.loads(summary.read_text())["seconds"]
    assert 45 <= seconds < 60, "the time of all parts together"

    once.start()
    once.end(0)
    assert once.statuses() == ["completed"] and "going on after step" in once.log()
