"""The core does without its wings: a run needs no W&B, no plots, no hub; --help needs no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Imported by every Python process before anything else, if it stands on its path. To look for a
# package finds nothing then, as where it is not installed.
BLOCK = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in {blocked} else find_spec(name, path, target)


PathFinder.find_spec = staticmethod(find_others)
"""


def without(
    blocked: tuple[str, ...], script: str, *arguments: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS` where these packages cannot be imported."""
    block = cwd / "block"
    block.mkdir(exist_ok=True)
    (block / "sitecustomize.py").write_text(BLOCK.format(blocked=blocked))
    paths = [str(block), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip


def test_a_sweep_completes_without_the_libraries_of_the_wings(
    small: list[str], tmp_path: Path
) -> None:
    blocked = ("wandb", "matplotlib", "optuna", "datasets", "hydra_plugins", "pandas")
    sweep = ["-m", *small, "trainer.max_steps=4", "model.rounds=0,1", "hydra.sweep.dir=sweep"]
    done = without(blocked, "train.py", *sweep, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    for job in ("0", "1"):
        summary = json.loads((tmp_path / "sweep" / job / "summary.json").read_text())
        assert summary["status"] == "completed" and summary["test"]["static"]["nats"] > 0
    said = (done.stdout + done.stderr).splitlines()
    assert said.count("matplotlib is not installed: curves.png is left out") == 2
    assert "matplotlib is not installed: sweep.png is left out" in said
    assert len((tmp_path / "sweep/report/sweep.csv").read_text().splitlines()) == 3
    assert "![]" not in (tmp_path / "sweep/report/sweep.md").read_text()
    done = without(blocked, "scripts/report.py", "sweep", "html=page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "what the page would draw is left out" in done.stderr
    assert not list(tmp_path.rglob("*.png")) and "<svg" not in (tmp_path / "page.html").read_text()


SCRIPTS = ["train.py", *(f"scripts/{path.name}" for path in sorted(ROOT.glob("scripts/*.py")))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script: str, tmp_path: Path) -> None:
    done = without(("torch", "datasets", "wandb", "matplotlib"), script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(script).name in done.stdout and not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["block"], "help leaves nothing"
