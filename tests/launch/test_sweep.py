"""Multiruns through the command line: failures, being killed, going on, what the report says."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mogrifier_lm.config import validate
from mogrifier_lm.files import write_json
from mogrifier_lm.kernels.recurrence import resolve
from mogrifier_lm.launch import cli
from mogrifier_lm.launch.job import run_in
from mogrifier_lm.launch.overrides import as_values
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import ROOT, compose_config
from tests.runs.test_run import command, train


def rows(sweep_dir: Path) -> list[dict[str, str]]:
    with open(sweep_dir / "report/sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_an_impossible_value_costs_its_own_run_only(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = train(
        ["-m", "model.rounds=0,-1", "trainer.threads=1,null", "model.hidden_size=8",
         f"data.cache_dir={cache_dir}", "trainer.max_steps=2", "tracker=none",
         "evaluators.static.batch_size=64", "report.formats=[pdf]"], tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert {f.suffix for f in tmp_path.glob("runs/*/*/report/sweep.*")} >= {".png", ".pdf"}
    assert "Traceback" not in done.stderr + done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: runs/") and last.endswith(
        "model.rounds is -1, it must be at least 0"
    )
    (sweep_dir,) = tmp_path.glob("runs/*/*")
    assert [row["status"] for row in rows(sweep_dir)] == ["completed"] * 2 + ["failed"] * 2
    for row in rows(sweep_dir)[2:]:
        assert row["error"] == "model.rounds is -1, it must be at least 0"
        text = (sweep_dir / row["run"] / "train.log").read_text()
        assert "Traceback" in text and "_check_ranges" in text
    for row in rows(sweep_dir)[:2]:
        assert float(row["valid/static/ppl"]) > float(row["test/static/ppl"]) * 0.8 > 0
        assert row["params"] and row["hidden_size"] == "8" and row["tokens_per_second"]
        assert "Traceback" not in (sweep_dir / row["run"] / "train.log").read_text()
    cells = [line.split() for line in (sweep_dir / "report/sweep.md").read_text().splitlines()]
    assert "| 2 | -1 | 1 | 1 | failed |".split() in [line[:11] for line in cells]
    assert (sweep_dir / "report/sweep.png").stat().st_size > 5000
    assert "2 of 4 runs done, 1 failed, 1 left, about" in done.stdout
    assert "2 of 4 runs done, 2 failed, 0 left" in done.stdout
    used = [json.loads((sweep_dir / run / "provenance.json").read_text()) for run in "01"]
    assert [facts["cpu"]["threads"] for facts in used] == [1, 2], "the next run kept one thread"


def test_a_killed_sweep_goes_on_by_the_same_command(small: list[str], tmp_path: Path) -> None:
    sweep_dir = tmp_path / "sweep"
    base = [o for o in small if not o.startswith(("model.hidden", "trainer.max_steps"))]
    options = ["trainer.max_steps=120", "trainer.valid_every=40",
               "trainer.checkpoint_minutes=0.002", "trainer.threads=1",
               "model.num_params=20e3"]  # fmt: skip
    arguments = [*base, *options, "sweep=rounds", "model.rounds=0,2", "seed=1,2",
                 f"hydra.sweep.dir={sweep_dir}"]  # fmt: skip
    process = subprocess.Popen(command(arguments), cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        path = sweep_dir / "1/metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) > 30:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    finished = RunFolder(sweep_dir / "0").best.stat().st_mtime_ns
    assert not (sweep_dir / "1/summary.json").exists()
    done = train(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sweep/0 is completed: skipped" in done.stdout and "going on after step" in done.stdout
    assert RunFolder(sweep_dir / "0").best.stat().st_mtime_ns == finished
    assert [row["status"] for row in rows(sweep_dir)] == ["completed"] * 4
    assert [(row["model.rounds"], row["seed"]) for row in rows(sweep_dir)] == [
        ("0", "1"), ("0", "2"), ("2", "1"), ("2", "2")]  # fmt: skip
    sizes = [(int(row["params"]), int(row["hidden_size"])) for row in rows(sweep_dir)]
    assert all(18e3 < params <= 20e3 for params, _ in sizes) and sizes[0][1] > sizes[2][1]
    # More values: the folder of a run is found by its overrides, whatever its number is now; one
    # whose config is not what the command makes is refused and left alone.
    saved = sweep_dir / "1/config.yaml"
    saved.write_text(saved.read_text().replace("bptt: 10", "bptt: 11"))
    shutil.rmtree(sweep_dir / "1/checkpoints")  # to save space; its figures stay
    arguments[arguments.index("model.rounds=0,2")] = "model.rounds=2,1,0"
    arguments[arguments.index("seed=1,2")] = "seed=2"
    done = train(arguments, tmp_path)
    assert done.returncode == 1 and "sweep/3 is completed: skipped" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: sweep/1: ") and last.endswith("take another hydra.sweep.dir")
    assert [(row["run"], row["model.rounds"], row["status"]) for row in rows(sweep_dir)] == [
        ("0", "0", "completed"), ("1", "0", "completed"), ("2", "2", "completed"),
        ("3", "2", "completed"), ("4", "1", "completed")], done.stdout  # fmt: skip


def test_runs_side_by_side(small: list[str], tmp_path: Path) -> None:
    arguments = ["-m", "hydra/launcher=local", *small, "model.rounds=0,-1,2,3",
                 f"hydra.sweep.dir={tmp_path}/sweep"]  # fmt: skip
    done = train(arguments, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: sweep/1: model.rounds is -1, it must be at least 0"
    statuses = {row["model.rounds"]: row["status"] for row in rows(tmp_path / "sweep")}
    assert statuses == dict.fromkeys("023", "completed") | {"-1": "failed"}
    assert "[3] training ended: 12 steps" in done.stdout
    assert "3 of 4 runs done, 1 failed, 0 left" in done.stdout
    cores = len(os.sched_getaffinity(0))
    for run in "023":
        facts = json.loads((tmp_path / "sweep" / run / "provenance.json").read_text())
        assert facts["cpu"]["threads"] == max(1, cores // 2), "its share of the cores"
    again = train(arguments, tmp_path)
    assert again.stdout.count("is completed: skipped") == 3 and again.returncode == 1
    bad = train(["-m", "hydra/launcher=lokal", "seed=1,2"], tmp_path)
    assert "error: no hydra/launcher=lokal; did you mean local" in bad.stderr, bad.stderr


def test_a_run_has_one_process_at_a_time(small: list[str], tmp_path: Path) -> None:
    sweep = ["-m", *small, "seed=1", f"hydra.sweep.dir={tmp_path}/sweep"]
    with RunFolder(tmp_path / "sweep" / "0").locked():
        write_json(tmp_path / "sweep/0/overrides.json", as_values([*small, "seed=1"]))
        done = train(sweep, tmp_path)
        assert done.returncode == 1
        assert "another process is at work in" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "sweep/0/summary.json").exists(), "it is the other's to write"
        alone = train([*small, f"hydra.run.dir={tmp_path}/sweep/0"], tmp_path)
        assert "another process is at work in" in alone.stderr
    assert train(sweep, tmp_path).returncode == 0


def test_sweeps_that_start_in_one_second_do_not_share_a_folder(tmp_path: Path) -> None:
    arguments = command(["-m", "model.rounds=-1", "seed=1,2"])
    both = [subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate() and process.returncode for process in both] == [1, 1]
    assert [len(rows(path)) for path in tmp_path.glob("runs/*/*")] == [2, 2]


LEFTOVERS = """
import gc, sys, weakref
import mogrifier_lm.runs.run
from mogrifier_lm.launch import cli

class Model: pass
models = []

def run(config, folder, *others):
    gc.collect()
    assert all(model() is None for model in models), "the model of a failed run is still there"
    model = Model()
    models.append(weakref.ref(model))
    raise RuntimeError(f"failure {len(models)}")

mogrifier_lm.runs.run.run = run
sys.argv = ["train.py", "-m", "seed=1,2,3"]
cli.train()
"""


def test_a_failed_run_leaves_nothing_in_memory(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LEFTOVERS], cwd=tmp_path, capture_output=True,
                          text=True, env=environment)  # fmt: skip
    assert done.returncode == 1
    (sweep_dir,) = tmp_path.glob("runs/*/*")
    assert [row["error"] for row in rows(sweep_dir)] == [f"failure {i}" for i in (1, 2, 3)]


def test_a_run_stopped_by_its_launcher_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> float:
        raise SystemExit(-1)  # what submitit's handler of SLURM's signal does

    monkeypatch.setattr("mogrifier_lm.runs.run.run", stopped)
    with pytest.raises(SystemExit):
        run_in(compose_config(), RunFolder(tmp_path), [], in_sweep=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and "time limit" in summary["error"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Could not detect srun", "Could not detect srun"),
        ("Job 6_1 (task: 0) with path /s/6_1_0_result.pkl\nhas not produced any output "
         "(state: FAILED)\nNo error stream\n---\nlines",
         "job 6_1 has not produced any output (state: FAILED): its log is /s/6_1_0_log.out; "),
        ("A worker process managed by the executor was unexpectedly terminated. This...\n\nThe",
         "a process of the sweep was killed (too little memory?) and the others ended with it; "),
        ("Job (task=0) failed during processing with trace:\n---\nTraceback\nKeyError: 'x'",
         "a job failed before its run began: KeyError: 'x'"),
    ],
)  # fmt: skip
def test_errors_of_launchers_are_one_line(
    text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError(text)

    # A frame of the installed package is what tells that an error is submitit's.
    names: dict[str, Any] = {"fail": fail}
    exec(compile("def launch(): fail()", "site-packages/submitit/core.py", "exec"), names)
    with pytest.raises(SystemExit):
        cli.guarded(names["launch"])
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1


def test_a_budget_of_parameters_goes_with_a_backend_that_is_named() -> None:
    try:
        resolve("native", "cpu")
    except ValueError as reason:
        pytest.skip(str(reason))
    config = ModelConfig(num_params=20e3, rounds=2, backend="native")
    assert 18e3 < build_model(config, vocab_size=100).num_params() <= 20e3


def test_resume_belongs_to_one_run(tmp_path: Path) -> None:
    done = train(["-m", "seed=1,2", "resume=somewhere"], tmp_path)
    assert done.returncode == 1 and "hydra.sweep.dir=DIR" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/sweep").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_run_of_a_named_sweep_composes(path: Path) -> None:
    params = OmegaConf.load(path).hydra.sweeper.params
    values: dict[str, Sequence[str]] = {str(k): str(v).split(",") for k, v in params.items()}
    jobs = [dict(zip(values, job, strict=True)) for job in itertools.product(*values.values())]
    configs: list[Any] = []
    for job in (job for job in jobs if job["seed"] == "1"):
        overrides = [f"{key}={value}" for key, value in job.items()]
        configs.append(validate(compose_config([f"sweep={path.stem}", *overrides])))
    assert len(configs) > 1 and all(a != b for a, b in itertools.combinations(configs, 2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_ends_a_sweep_ends_its_workers(
    number: signal.Signals, small: list[str], tmp_path: Path
) -> None:
    """Each saves its step; the same command ends as one that nobody has ended."""
    sweep = ["-m", *small, "model.rounds=0,1", "trainer.max_steps=300", "trainer.log_every=5",
             "trainer.threads=1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]  # fmt: skip
    folders = [RunFolder(tmp_path / "cut" / name) for name in ("0", "1")]
    process = subprocess.Popen(
        command([*sweep, f"hydra.sweep.dir={tmp_path}/cut"]), cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not all(len([*folder.rows()]) > 2 for folder in folders):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == -number
    for folder in folders:
        with folder.locked(wait=True):  # until the worker has ended, too
            assert folder.read_summary()["status"] == "interrupted"
            assert folder.can_resume()
    for place in ("cut", "whole"):
        done = train([*sweep, f"hydra.sweep.dir={tmp_path}/{place}"], tmp_path)
        assert done.returncode == 0, done.stderr
    for folder in folders:
        whole = RunFolder(tmp_path / "whole" / folder.path.name)
        assert folder.read_summary()["valid"] == whole.read_summary()["valid"]
        assert "going on after step" in folder.log.read_text()
