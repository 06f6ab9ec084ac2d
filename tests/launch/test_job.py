"""A run as the command launches it: what stands around the core's `run`."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mogrifier_lm.config import save_config, validate
from mogrifier_lm.launch.tracked import tracked_run
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking.tracker import Tracker
from mogrifier_lm.training import checkpoint
from tests.conftest import compose_config


@pytest.mark.usefixtures("own_wandb")
def test_the_id_in_an_older_checkpoint_is_gone_on_with(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's id was a field of the trainer's progress; now it is a file of the run."""
    config = validate(compose_config([*small, "tracker=wandb", "tracker.mode=offline"]))
    save_config(config, RunFolder(tmp_path).config)

    def cut(tracker: Tracker, metrics: Mapping[str, float]) -> None:
        if metrics["step"] > 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tracker, "log", cut)
        tracked_run(config, RunFolder(tmp_path), [])
    (tmp_path / "wandb.json").unlink()
    path = RunFolder(tmp_path).last
    tensors, values = checkpoint.load(path)
    assert "run_id" not in values["progress"]
    checkpoint.save(path, tensors, values | {"progress": values["progress"] | {"run_id": "old7"}})
    tracked_run(config, RunFolder(tmp_path), [])
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"run_id": "old7"}
    assert list(tmp_path.glob("wandb/offline-run-*-old7"))
