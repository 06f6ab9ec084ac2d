"""Runs that are ended, and results that stay: docs/reliability.md."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mogrifier_lm import load_model
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import ROOT
from tests.runs.test_run import command, figures, metrics, train

LONG = ["trainer.max_steps=1200", "trainer.valid_every=400", "trainer.log_every=10",
        "trainer.threads=1"]  # fmt: skip


def signalled(arguments: list[str], folder: Path, rows: int, number: signal.Signals) -> Any:
    """A run that gets a signal once it has logged so many rows; its process and what it says.

    Ctrl-C is for it, also where the tests are a shell's background job, which ignores it.
    """
    process = subprocess.Popen(
        command(arguments), cwd=folder.parent, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= rows):
        time.sleep(0.005)
    process.send_signal(number)
    return process, process.communicate()[1]


@pytest.mark.slow
def test_a_run_that_is_told_to_end_loses_no_step(small: list[str], tmp_path: Path) -> None:
    """Checkpoints are five minutes apart: what is gone on from was saved because of the signal."""
    options = [*small, *LONG]
    assert train([*options, f"hydra.run.dir={tmp_path}/whole"], tmp_path).returncode == 0
    cut = tmp_path / "cut"
    arguments = [*options, f"hydra.run.dir={cut}"]
    for rows, number in ((5, signal.SIGTERM), (40, signal.SIGINT), (80, signal.SIGUSR1)):
        process, said = signalled(arguments, cut, rows, number)
        assert process.returncode == (130 if number == signal.SIGINT else -number), said
        assert "Traceback" not in said
        summary = RunFolder(cut).read_summary()
        assert summary["status"] == "interrupted" and summary["seed"] == 1
        arguments = [f"resume={cut}"]
    done = train(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    began = [int(line.split()[-1]) for line in done.stdout.splitlines() if "going on after" in line]
    assert began and began[0] >= 780, "it went back behind what was logged before the last signal"
    assert figures(cut) == figures(tmp_path / "whole")
    assert metrics(cut) == metrics(tmp_path / "whole")


def test_ctrl_c_prints_the_command_that_goes_on(small: list[str], tmp_path: Path) -> None:
    cut = tmp_path / "it's (mine)"
    arguments = [*small, *LONG, "trainer.max_steps=100000", f"hydra.run.dir={cut}"]
    process, said = signalled(arguments, cut, 3, signal.SIGINT)
    assert process.returncode == 130, said
    last = said.splitlines()[-1]
    assert last.startswith("interrupted; python train.py ") and last.endswith(" goes on")
    typed = last.removeprefix("interrupted; python ").removesuffix(" goes on")
    done = subprocess.run(
        f"{sys.executable} {ROOT}/{typed} trainer.max_steps=1", shell=True, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert RunFolder(cut).read_summary()["status"] == "completed"


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run which evaluate.py has added scores to."""
    from tests.conftest import write_text

    folder = tmp_path_factory.mktemp("completed")
    write_text(folder / "text", 1500, 300, vocab_size=300)
    done = train(
        ["data=text", f"data.dir={folder}/text", f"data.cache_dir={folder}/cache", "tracker=none",
         "model.hidden_size=10", "trainer.batch_size=4", "trainer.bptt=9", "trainer.max_steps=9",
         "model.unigram_bias=false",
         "trainer.max_epochs=null", "trainer.valid_every=4", f"hydra.run.dir={folder}/run"], folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = [sys.executable, str(ROOT / "scripts/evaluate.py"), f"run={folder}/run"]
    subprocess.run([*script, "evaluators=[rounds]"], check=True, capture_output=True)
    assert "rounds" in RunFolder(folder / "run").read_summary()["test"]
    return folder


@pytest.fixture
def run(completed: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(completed / "run", tmp_path / "run"))


def test_what_others_have_scored_stays_when_a_completed_run_is_resumed(run: RunFolder) -> None:
    before = run.read_summary()
    done = train([f"resume={run.path}"], run.path.parent)
    assert done.returncode == 0, done.stderr
    assert run.read_summary()["test"] == before["test"]
    done = train([f"resume={run.path}", "trainer.max_steps=90"], run.path.parent)
    assert done.returncode == 0, done.stderr
    after = run.read_summary()
    assert after["best_step"] > before["best_step"] and "rounds" not in after["test"]
    assert "test text: what rounds gave was of other weights and is gone" in done.stdout


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("both", "state.safetensors is damaged"),
        ("gone", "holds results, but no checkpoint to go on from"),
        ("config", "config.yaml is damaged"),
        ("tokenizer", "tokenizer.json is damaged"),
    ],
)
def test_completed_results_outlive_what_is_damaged(run: RunFolder, damage: str, says: str) -> None:
    before = run.summary.read_bytes()
    if damage == "both":
        for file in (run.last, run.previous):
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 32
            file.write_bytes(raw)
    elif damage == "gone":
        shutil.rmtree(run.last.parent)
    else:
        getattr(run, damage).write_text("{")
    done = train([f"resume={run.path}", "trainer.max_steps=11"], run.path.parent)
    assert done.returncode == 1 and says in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and run.summary.read_bytes() == before


def full_at(size: int) -> Any:
    """Files cannot grow beyond a size, which is an error of writing as a full disk is."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_is_one_line_that_names_the_file(completed: Path, tmp_path: Path) -> None:
    arguments = ["data=text", f"data.dir={completed}/text", f"data.cache_dir={completed}/cache",
                 "model.hidden_size=10", "trainer.batch_size=4", "trainer.bptt=9", "tracker=none",
                 "trainer.max_steps=400", "trainer.max_epochs=null", "trainer.valid_every=4",
                 "trainer.log_every=1"]  # fmt: skip
    named = set()
    for size in np.geomspace(3000, 60_000, 8):
        folder = tmp_path / str(int(size))
        done = subprocess.run(
            command([*arguments, f"hydra.run.dir={folder}"]), cwd=tmp_path, capture_output=True,
            text=True, preexec_fn=full_at(int(size)),
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert last.startswith("error: ") and "File too large" in last, last
        named.add(last.partition(" cannot be written")[0].rpartition("/")[2])
    assert "state.safetensors" in named and len(named) >= 2, named


@pytest.mark.slow
def test_one_damaged_overrides_file_does_not_stop_a_sweep(completed: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = ["-m", "data=text", f"data.dir={completed}/text", f"hydra.sweep.dir={sweep}",
                 f"data.cache_dir={completed}/cache", "model.hidden_size=10", "tracker=none",
                 "trainer.batch_size=4", "trainer.bptt=9", "trainer.max_steps=3",
                 "trainer.max_epochs=null"]  # fmt: skip
    assert train([*arguments, "seed=1,2"], tmp_path).returncode == 0
    for damage in ("", "[]"):
        (sweep / "0/overrides.json").write_text(damage)
        done = train([*arguments, "seed=2,3"], tmp_path)
        assert done.returncode == 0, done.stderr
    assert RunFolder(sweep / "2").read_summary()["seed"] == 3
    table = (sweep / "report/sweep.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table[1:]] == ["0", "1", "2"]
    assert json.loads((sweep / "0/summary.json").read_text())["status"] == "completed"


@pytest.fixture
def read_only(run: RunFolder, tmp_path: Path) -> Iterator[RunFolder]:
    """A completed run on a file system that takes no writes, as a snapshot or an archive is."""
    place = tmp_path / "mount"
    place.mkdir()
    bound = [["--bind", str(run.path), str(place)], ["-o", "remount,bind,ro", str(place)]]
    try:
        for options in bound:
            subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        subprocess.run(["umount", str(place)], capture_output=True, check=False)
        pytest.skip("a file system is mounted by root alone")
    yield RunFolder(place)
    subprocess.run(["umount", str(place)], check=True)


def test_a_run_on_a_read_only_file_system_is_refused_in_one_line(
    read_only: RunFolder, tmp_path: Path
) -> None:
    evaluate = [sys.executable, str(ROOT / "scripts/evaluate.py"), f"run={read_only.path}"]
    commands = [command([f"resume={read_only.path}", "trainer.max_steps=20"]), evaluate]
    for each in commands:
        done = subprocess.run(each, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and "cannot be written to" in last, last
        assert "take a copy of it" in last
    load_model(read_only.path).next_word("the")
