"""A whole run through the command line: its files, its errors, and being killed."""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mogrifier_lm import load_model
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import ROOT


def command(overrides: Sequence[str]) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def train(overrides: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(overrides), cwd=cwd, capture_output=True, text=True, timeout=300)


def figures(run_dir: Path) -> dict[str, Any]:
    """summary.json without what depends on the clock."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_second")}


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "train/tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def test_a_run_leaves_the_documented_files(small: list[str], tmp_path: Path) -> None:
    done = train([*small, "report.formats=[svg]"], tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = tmp_path.glob("runs/*/*")
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml", "provenance.json", "metrics.jsonl", "summary.json", "train.log",
        "curves.png", "curves.svg", "tokenizer.json",
        "checkpoints/best/model.safetensors", "checkpoints/last/state.safetensors",
    }  # fmt: skip
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 12
    for split in ("valid", "test"):
        score = summary[split]["static"]
        assert score["tokens"] == score["words"] >= 300 and score["batch_size"] == 1
        assert score["ppl"] == pytest.approx(2.718281828459045 ** (score["nats"] / score["words"]))
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert set(provenance["data"]["sha256"]) == {"train", "valid", "test"}
    assert (provenance["device"], provenance["device_name"]) == ("cpu", None)
    assert {"command", "git", "versions", "cpu", "backend", "output_backend"} <= set(provenance)
    assert f"on {provenance['device']}, kernels" in (run_dir / "train.log").read_text()
    assert load_model(run_dir).num_params() == summary["params"]
    assert f"{summary['test']['static']['ppl']:.2f}" in done.stdout + done.stderr


def test_synthetic_runs_carry_the_floor(small: list[str], cache_dir: Path, tmp_path: Path) -> None:
    overrides = [o for o in small if not o.startswith(("data=", "data.dir"))]
    done = train([*overrides, "trainer.max_steps=2", "evaluators=[static]",
                  "evaluators.static.batch_size=64"], tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run_dir,) = tmp_path.glob("runs/*/*")
    summary = json.loads((run_dir / "summary.json").read_text())
    for split in ("valid", "test"):
        assert 1 < summary[split]["floor_ppl"] < summary[split]["static"]["ppl"]


# Whatever holds state of its own between steps.
EVERYTHING = [
    "regularization.per_step=true", "regularization.weight_dropout=0.3", "regularization.samples=2",
    "regularization.reset_state=0.1", "trainer.streams=read_heads", "trainer.variable_bptt=true",
    "optimizer.name=radam", "optimizer.averaging=two_tailed", "optimizer.averaging_patience=2",
    "model.mixture=2", "trainer.precision=bf16", "trainer.accumulation_steps=2",
    "trainer.warmup_steps=60", "trainer.lr_decay=cosine", "trainer.keep_last=3",
    "trainer.keep_best=2",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [pytest.param([], marks=pytest.mark.slow), EVERYTHING],
    ids=["plain", "everything"],
)
def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_one(
    small: list[str], tmp_path: Path, overrides: list[str]
) -> None:
    options = [
        *small, "regularization=small", "trainer.max_steps=240", "trainer.lr_drop=0.5",
        "trainer.valid_every=30", "trainer.checkpoint_minutes=0.002", "trainer.threads=1",
        *overrides,
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = train([*options, f"hydra.run.dir={whole}"], tmp_path)
    assert done.returncode == 0, done.stderr
    arguments, kills = [*options, f"hydra.run.dir={cut}"], 0
    for steps in (20, 90, 170):
        process = subprocess.Popen(
            command(arguments), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            lines = (cut / "metrics.jsonl").read_text().splitlines() if cut.exists() and (
                cut / "metrics.jsonl").exists() else []  # fmt: skip
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= steps:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        kills += process.returncode == -signal.SIGKILL
        arguments = [f"resume={cut}"]
    assert kills == 3, "the run ended before it could be killed"
    assert RunFolder(cut).last.is_file() and not (cut / "summary.json").exists()
    done = train(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(cut) == figures(whole)
    assert metrics(cut) == metrics(whole)
    files = {path.relative_to(whole) for path in whole.glob("checkpoints/*/*.safetensors")}
    assert files - {path.relative_to(cut) for path in cut.rglob("*")} == set()
    assert len({*cut.glob("checkpoints/*/step-*")}) == (5 if overrides else 0)
    for name in files - {Path("checkpoints/last/previous.safetensors")}:
        ours, theirs = (load_file(path / name) for path in (cut, whole))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_resume_takes_further_limits_and_refuses_another_model(
    small: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train([*small, f"hydra.run.dir={run_dir}"], tmp_path).returncode == 0
    refused = train([f"resume={run_dir}", "model.rounds=1"], tmp_path)
    assert refused.returncode == 1
    assert "model.rounds=1 is not what" in refused.stderr
    again = train([*small, f"hydra.run.dir={run_dir}", "seed=2"], tmp_path)
    assert again.returncode == 1 and "holds a run already" in again.stderr
    assert figures(run_dir)["status"] == "completed", "a refused command took the run's summary"
    assert "seed: 1\n" in (run_dir / "config.yaml").read_text()
    assert train([f"resume={run_dir}", "trainer.max_steps=20"], tmp_path).returncode == 0
    assert figures(run_dir)["steps"] == 20


def test_a_multirun_leaves_complete_runs_and_a_failure_does_not_stop_the_others(
    small: list[str], tmp_path: Path
) -> None:
    done = train(["-m", *small, "model.rounds=0,2", "model.rank=null,99"], tmp_path)
    assert done.returncode == 1
    statuses = {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in tmp_path.glob("runs/*/*/*/summary.json")
    }
    assert statuses == {"0": "completed", "1": "failed", "2": "completed", "3": "failed"}
    assert "model.rank is 99" in done.stderr


BAD = {
    "data=text": "data=text needs data.dir=FOLDER",
    "data.dir=nowhere": "data.dir: no folder nowhere",
    "model.hidden_size=-3": "model.hidden_size is -3, it must be at least 1",
    "regularization.input_dropout=1.5": "regularization.input_dropout is 1.5, it must be below 1",
    "model.rank=13": "model.rank is 13, it must lie between 1 and 12",
    "trainer.bptt=0": "trainer.bptt is 0, it must be at least 1",
    "trainer.bptt=5000": "which is shorter than one window",
    "trainer.batch_size=100000": "100000 streams over a text of",
    "trainer.device=cuda:7": "trainer.device=cuda:7 cannot be used here",
    "trainer.device=gpu": "trainer.device=gpu cannot be used here",
    "trainer.max_steps=null": "no end of training",
    "model.num_params=1e6": "model.num_params and model.hidden_size exclude each other",
    "model.roundz=3": "unknown key model.roundz; did you mean model.rounds?",
    "+model.foo=1": "unknown key model.foo",
    "lr=0.1": "unknown key lr; did you mean optimizer.lr or",
    "rounds=3": "unknown key rounds; did you mean model.rounds?",
    "optimizer.learning_rate=1": "did you mean optimizer.lr?",
    "+trainer.bpt=1": "unknown key trainer.bpt; did you mean trainer.bptt?",
    "model=mogrifer": "no model=mogrifer; did you mean mogrifier?",
    "model.rounds=x": "model.rounds: Value 'x' of type 'str' could not be converted to Integer",
    "optimizer.lr=nan": "optimizer.lr is nan",
    "trainer.precision=fp16": "trainer.precision is 'fp16', it must be one of fp32, bf16",
    "evaluators=[dynamic_cache]": "evaluators=[dynamic_cache] needs dynamic beside it",
    "evaluators.cache.theta=[0.5]": "an evaluator has to be named beside it",
    "model.top_hidden_size=5": "model.top_hidden_size needs two layers or more",
    "resume=nowhere": "resume=nowhere: no config.yaml there",
    "hydra.run.dir=/proc/nothing": "/proc/nothing",
}


# What a value says by itself is said once, before there is a folder; the rest needs text or device.
EARLY = {o for o in BAD if o.startswith(("model.h", "reg", "trainer.m", "optimizer.", "trainer.p"))}
EARLY |= {"trainer.bptt=0", "model.num_params=1e6", "model.rounds=x", "lr=0.1", "rounds=3"}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_clear_line(override: str, small: list[str], tmp_path: Path) -> None:
    base = small if override != "data=text" else [o for o in small if "data.dir" not in o]
    done = train([*base, override], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and BAD[override] in last
    assert not list(tmp_path.rglob("checkpoints"))
    assert done.stderr.count("\n") == 1 and "error" not in done.stdout
    if override in EARLY:
        assert not done.stdout and not [*tmp_path.iterdir()]
    for path in tmp_path.rglob("summary.json"):
        assert json.loads(path.read_text())["status"] == "failed"


def test_debug_shows_the_traceback(small: list[str], tmp_path: Path) -> None:
    done = train([*small, "trainer.bptt=0", "debug=true"], tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_help_is_short_and_quick(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command(["--help"]), capture_output=True, text=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the CPU's time, which does not depend on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 40
    for word in (
        "python train.py -m",
        "model: lstm, mogrifier",
        "model.rounds",
        "trainer.max_epochs",
    ):
        assert word in done.stdout


def test_fine_tuning_starts_from_the_averaged_weights_of_another_run(
    small: list[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    averaged = ["optimizer.averaging=ema", "optimizer.averaging_decay=0.5"]
    assert train([*small, *averaged, f"hydra.run.dir={first}"], tmp_path).returncode == 0
    tuned = [*small, f"trainer.init_from={first}", f"hydra.run.dir={second}", "optimizer.lr=1e-12",
             "trainer.max_steps=1"]  # fmt: skip
    assert train(tuned, tmp_path).returncode == 0
    ppl = [figures(run)["valid"]["static"]["ppl"] for run in (first, second)]
    assert ppl[1] == pytest.approx(ppl[0], rel=1e-5)
    other = train([*small, f"trainer.init_from={first}", "model.rounds=1"], tmp_path)
    assert other.returncode == 1 and "does not fit this model" in other.stderr
