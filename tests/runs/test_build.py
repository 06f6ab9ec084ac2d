"""Sizes are reckoned, compared and refused before memory is taken for them."""

import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from mogrifier_lm import load_model
from mogrifier_lm.config import load_config, save_config, validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.runs import build
from mogrifier_lm.runs.build import (
    Size,
    build_model,
    check_device,
    check_training_memory,
    model_size,
)
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import compose_config, train


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.rounds=17", "model.share_rounds=true"],
        ["model.rounds=14", "model.rank=2", "model.num_layers=3", "model.top_hidden_size=6"],
        ["model.num_layers=15", "model.cell=rlstm", "model.rounds=1"],
        ["model.mixture=16", "model.num_layers=1", "model.cell=mlstm"],
        ["model.mixture=13", "model.num_layers=13", "model.rounds=13", "model.round_bias=false"],
        ["model.hidden_size=null", "model.num_params=40000", "model.embedding_ratio=1.5"],
    ],
)
def test_a_size_is_that_of_the_model(overrides: Sequence[str]) -> None:
    config = validate(compose_config(["model.hidden_size=7", *overrides])).model
    parameters = list(build_model(config, 61).parameters())
    size = Size(sum(p.numel() for p in parameters), len(parameters))
    assert model_size(config, 61) == size


@pytest.mark.parametrize(
    "overrides",
    ["rounds=990 hidden_size=7000", "num_layers=1000 rounds=1000", "num_params=7e14",
     "hidden_size=1500000", "mixture=900 hidden_size=9000", "embedding_size=9876543"],
)  # fmt: skip
def test_a_model_that_no_memory_holds_is_refused_with_what_it_would_take(overrides: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"would take at least [\d,.]+ GB, and cpu has [\d,.]+ GB"):
        given = [f"model.{override}" for override in overrides.split()]
        build_model(validate(compose_config(given)).model, 10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


@pytest.mark.parametrize(
    "override",
    ["trainer.batch_size=400000", "trainer.bptt=100000", "regularization.samples=1000"],
)
def test_a_training_that_no_memory_holds_is_refused(override: str) -> None:
    config = validate(
        compose_config(["trainer.streams=read_heads", "model.num_layers=30", override])
    )
    with pytest.raises(UserError, match="training would take at least"):
        check_training_memory(config, 10_000, 900_000, "cpu")
    check_training_memory(validate(compose_config()), 10_000, 900_000, "cpu")


def test_a_config_is_compared_with_its_checkpoint_before_memory_is_taken(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small, tmp_path)
    config = load_config(RunFolder(tmp_path).config)
    config.model.hidden_size, config.model.num_layers = 4000, 3
    save_config(config, RunFolder(tmp_path).config)
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match="does not fit the config and the tokenizer: it has"):
        load_model(tmp_path)
    from mogrifier_lm.runs import run

    monkeypatch.setattr(run, "build_model", build.build_model)
    with pytest.raises(UserError, match="last.*does not fit the config"):
        run.run(config, RunFolder(tmp_path))


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="trainer.device=meta cannot be used here"):
        check_device("meta")
