"""The benchmark runs, and times only what agrees with the reference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.kernels.recurrence import BACKENDS
from mogrifier_lm.launch.benchmarks import models
from mogrifier_lm.launch.commands.benchmark import main
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_benchmark_times_every_backend_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "seconds=0.1", "threads=1"]
    options = ["what=evaluate,step", "shape=2x200-r5", "tokens=20", f"json={out}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    for part, others in (("evaluate", set()), ("step", {"example"})):
        assert {row["candidate"] for row in rows if row["part"] == part} == set(BACKENDS) | others
    assert all(row["not timed"] if "not timed" in row else row["ms"] > 0 for row in rows)
    assert all(row["candidate"] in done.stdout for row in rows)


@pytest.mark.slow
def test_a_recipes_step_and_its_scoring_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small width: the whole one takes minutes on a CPU."""
    real = models.compose
    small = ["model.num_params=40000", "model.rank=4", "trainer.batch_size=4", "trainer.bptt=10"]
    monkeypatch.setattr(models, "compose", lambda overrides: real([*overrides, *small]))
    monkeypatch.setitem(models.RECIPES, "ptb_mogrifier_24m", 100)
    rows = models.recipe("ptb_mogrifier_24m", "cpu", 0.1, profile=True)
    assert {row["candidate"] for row in rows} == {"example", "fused", "auto"}
    assert all(row["ms"] > 0 for row in rows)
    scored = models.recipe_scoring("ptb_mogrifier_24m", 50, "cpu")
    assert [row["candidate"] for row in scored] == ["static", "valid 128", "dynamic"]
    assert all(row["ptb, s"] > 0 for row in scored)


def test_a_misspelt_part_is_refused() -> None:
    with pytest.raises(UserError, match="what=steps.*recipes"):
        main(what=["steps"])
