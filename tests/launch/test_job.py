"""A run as the command launches it: what stands around the core's `run`."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mogrifier_lm.config import save_config, validate
from mogrifier_lm.launch.job import tracked_run
from mogrifier_lm.tracking.tracker import Tracker
from mogrifier_lm.training import checkpoint
from tests.conftest import compose_config
from tests.runs.test_run import train

# An import of any of these fails, as where it is not installed.
BLOCK = """
import sys
for name in ("wandb", "matplotlib", "optuna", "datasets", "hydra_plugins"):
    sys.modules[name] = None
"""


def test_a_run_needs_nothing_of_the_wings(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = train([*small, f"hydra.run.dir={tmp_path}/run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"
    assert not (tmp_path / "run/curves.png").exists()
    (line,) = [x for x in done.stdout.splitlines() if "curves.png" in x]
    assert line.startswith("curves.png is left out") and "matplotlib" in line


@pytest.mark.usefixtures("own_wandb")
def test_the_id_in_an_older_checkpoint_is_gone_on_with(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's id was a field of the trainer's progress; now it is a file of the run."""
    config = validate(compose_config([*small, "tracker=wandb", "tracker.mode=offline"]))
    save_config(config, tmp_path)

    def cut(tracker: Tracker, metrics: Mapping[str, float]) -> None:
        if metrics["step"] > 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tracker, "log", cut)
        tracked_run(config, tmp_path, [])
    (tmp_path / "wandb.json").unlink()
    path = tmp_path / checkpoint.LAST
    tensors, values = checkpoint.load(path)
    assert "run_id" not in values["progress"]
    checkpoint.save(path, tensors, values | {"progress": values["progress"] | {"run_id": "old7"}})
    tracked_run(config, tmp_path, [])
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"run_id": "old7"}
    assert list(tmp_path.glob("wandb/offline-run-*-old7"))
