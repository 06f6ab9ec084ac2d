"""How a run is called in W&B: an override beats the environment, which beats the default."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm.config import validate
from mogrifier_lm.launch import tracked
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking import tracker
from tests.conftest import compose_config, train


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
    found = asked("model.rounds=2")
    assert default != found["project"] == "theirs" and found["name"] == "a name"
    assert found["tags"] == ["one", "two", "synthetic", "lstm", "mogrifier"]
    found = asked("tracker.project=ours", "tracker.run_name=mine", "tracker.tags=[three]")
    assert (found["project"], found["name"]) == ("ours", "mine")
    assert found["tags"] == ["three", "synthetic", "lstm", "mogrifier"]


def test_names_are_no_longer_than_the_server_takes(asked: Any) -> None:
    found = asked(
        f"data.name={'x' * 200}", f"tracker.tags=[{'y' * 80}]", "model.rounds=2",
        f"tracker.group={'g' * 150}",
    )  # fmt: skip
    assert len(found["group"]) == 128
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


@pytest.mark.usefixtures("own_wandb")
def test_sampled_texts_are_tables_and_leave_training_alone(
    small: list[str], tmp_path: Path
) -> None:
    rows = train([*small, "tracker.name=none", "regularization=small"], tmp_path / "without")
    offline = ["tracker=wandb", "tracker.mode=offline", "tracker.samples=3"]
    same = train([*small, *offline, "regularization=small"], tmp_path / "with")
    clock = ("seconds", "train/tokens_per_second")
    assert [{k: v for k, v in row.items() if k not in clock} for row in rows] == [
        {k: v for k, v in row.items() if k not in clock} for row in same
    ]
    tables = [
        json.loads(f.read_text()) for f in tmp_path.glob("with/wandb/offline*/files/media/table/*")
    ]
    assert len(tables) == sum("valid/ppl" in row for row in rows) == 3
    assert {tuple(table["columns"]) for table in tables} == {("step", "text")}
    texts = [text for table in tables for _, text in table["data"]]
    assert len(texts) == 9 and all(len(text.split()) > 5 for text in texts)
    assert {step for table in tables for step, _ in table["data"]} == {5, 10, 12}
