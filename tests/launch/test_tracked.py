"""How a run is called in W&B: an override beats the environment, which beats the default."""

import logging
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm.config import validate
from mogrifier_lm.launch import tracked
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking import tracker
from tests.conftest import compose_config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function of overrides → what the tracker is built with."""
    seen: dict[str, Any] = {}

    def build(**settings: Any) -> tracker.Tracker:
        seen.update(settings)
        return tracker.Tracker()

    monkeypatch.setattr(tracker, "build_tracker", build)
    for name in ("PROJECT", "NAME", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)

    def ask(*overrides: str) -> dict[str, Any]:
        config = validate(compose_config(overrides))
        tracked._open_tracker(config, RunFolder(tmp_path), overrides, {})
        return seen

    return ask


def test_wandbs_own_variables_are_obeyed(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("model.rounds=2")["name"] == "rounds=2"
    default = asked()["project"]
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "a name")
    monkeypatch.setenv("WANDB_TAGS", "one, two,")
    found = asked("model.rounds=2", "tracker.tags=[mine]")
    assert default != found["project"] == "theirs" and found["name"] == "a name"
    assert found["tags"] == ["mine", "one", "two", "synthetic", "lstm", "mogrifier"]
    found = asked("tracker.project=ours", "tracker.run_name=mine")
    assert (found["project"], found["name"]) == ("ours", "mine")


def test_names_are_no_longer_than_the_server_takes(asked: Any) -> None:
    found = asked(f"data.name={'x' * 200}", f"tracker.tags=[{'y' * 80}]", "model.rounds=2")
    assert len(found["name"]) == 128 and found["name"].endswith("rounds=2")
    assert max(map(len, found["tags"])) == 64


def test_a_torch_that_was_not_tested_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for version in ("2.11.0+cu130", "2.13.1", "2.12.0.dev1"):
            tracked.warn_of_torch(version)
        assert not caplog.messages
        for version in ("2.10.1", "2.14.0", "3.0"):
            tracked.warn_of_torch(version)
    assert len(caplog.messages) == 3
    assert caplog.messages[1] == "torch 2.14.0 was not tested, 2.11 to 2.13 were"
