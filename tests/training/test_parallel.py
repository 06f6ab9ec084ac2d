"""One run in two processes is the run of one process, to rounding."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs.test_run import metrics, train

# Everything that could depend on a process's share: every mask, several samples, penalties that are
# means, zeroed states, an average, windows of variable length.
EVERYTHING = [
    "trainer.max_steps=50",
    "trainer.log_every=1",
    "trainer.valid_every=10",
    "trainer.threads=1",
    "trainer.lr_decay=none",
    "trainer.variable_bptt=true",
    "regularization.input_dropout=0.2",
    "regularization.inter_layer_dropout=0.2",
    "regularization.state_dropout=0.2",
    "regularization.output_dropout=0.2",
    "regularization.embedding_dropout=0.1",
    "regularization.weight_dropout=0.2",
    "regularization.reset_state=0.1",
    "regularization.samples=2",
    "regularization.ar=2",
    "regularization.tar=1",
    "regularization.l2=1e-5",
    "optimizer.averaging=two_tailed",
    "model.num_layers=2",
    "trainer.accumulation_steps=2",
]


def torchrun(overrides: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("streams", ["columns", pytest.param("read_heads", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(small: list[str], tmp_path: Path, streams: str) -> None:
    overrides = [*small, *EVERYTHING, f"trainer.streams={streams}"]
    one = train([*overrides, "hydra.run.dir=one"], tmp_path)
    assert one.returncode == 0, one.stderr
    # Begun by two processes, ended by one, and the other way round: the checkpoint is the same.
    if streams == "columns":
        first, second = torchrun, train
    else:
        first, second = train, torchrun
    overrides = [o.replace("max_steps=50", "max_steps=30") for o in overrides]
    begun = first(overrides, tmp_path)
    assert begun.returncode == 0, begun.stderr
    (folder,) = tmp_path.glob("runs/*/*")
    ended = second([f"resume={folder}", "trainer.max_steps=50"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "going on after step 30" in ended.stdout
    both = begun.stdout + ended.stdout
    assert both.count("training ended") == 2, "one process alone speaks"
    lines = metrics(folder)
    same_lines = metrics(tmp_path / "one")
    assert len(lines) == len(same_lines) > 50
    for line, its in zip(lines, same_lines, strict=True):
        assert line == pytest.approx(its, rel=1e-4)


def test_what_processes_cannot_share_is_said(small: list[str], tmp_path: Path) -> None:
    done = torchrun([*small, "trainer.batch_size=5"], tmp_path)
    assert done.returncode == 1
    assert "error: trainer.batch_size is 5: 2 processes cannot share it equally" in done.stderr
    assert done.stderr.count("error:") == 1
    done = torchrun(["resume=nowhere"], tmp_path)
    assert "error: resume=nowhere: no config.yaml there" in done.stderr
    assert done.stderr.count("error:") == 1 and "[rank1]" not in done.stderr
    done = torchrun(["-m", *small, "seed=1,2"], tmp_path)
    assert done.returncode == 1
    assert "torchrun is for one run; a sweep is started without it" in done.stderr
