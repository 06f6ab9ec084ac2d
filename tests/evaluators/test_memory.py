"""What an evaluator keeps of a window is its nats: memory does not grow with the text."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mogrifier_lm.data import Split
from mogrifier_lm.evaluators.task import Task, evaluate
from mogrifier_lm.options import ModelConfig, RegularizationConfig
from tests.conftest import ROOT
from tests.evaluators.test_contract import EVALUATORS, SETTINGS

V, E, N = 10_000, 100, 12_000
STATUS = Path("/proc/self/status")  # Linux


def megabytes(key: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def growth(name: str) -> float:
    """Megabytes by which the process grows at most while it scores N tokens, after a few."""
    from mogrifier_lm.runs.build import build_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=E, rounds=2), V)
    ids = np.random.default_rng(0).integers(0, V, N).astype(np.uint16)

    def score(tokens: int, names: Sequence[str]) -> None:
        split = Split(ids=ids[:tokens], words=tokens, bytes=tokens, sha256="")
        splits = {"train": split, "test": split}
        rates = RegularizationConfig(input_dropout=0.4, output_dropout=0.4)
        task = Task(model, splits, 0, rates, needed=EVALUATORS[name].needs)
        for each in names:
            evaluate(each, EVALUATORS[each](**{**SETTINGS[each], "window": 20}), task, ["test"])

    names = [*EVALUATORS[name].needs, name]
    score(400, names)
    before = megabytes("VmRSS")
    score(N, names)
    return megabytes("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", EVALUATORS)
def test_memory_does_not_grow_with_the_text(name: str) -> None:
    """Dynamic evaluation took 850 MB here when it kept a small tensor of each window."""
    code = f"from tests.evaluators.test_memory import growth; print(growth({name!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = 4 * N * (E + 4) / 2**20  # hidden vectors and a few nats of each token
    assert float(done.stdout) < 3 * results + 60, done.stdout
