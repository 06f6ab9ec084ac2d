"""The recipes of the literature: their parameters are the published ones, and they train."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mogrifier_lm.config import Config, validate
from mogrifier_lm.data import ORDERS
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training.optim import build_averaging, build_optimizer
from mogrifier_lm.training.trainer import Trainer
from tests.conftest import ROOT, compose_config

FOLDER = ROOT / "configs" / "experiment"
NAMES = sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.yaml"))
# Published parameters, vocabulary (of LAMB: one more), hidden size of the first layer.
PUBLISHED = {
    "ptb_awd_lstm": (24_221_600, 10_000, 1150),
    "wt2_awd_lstm": (33_556_078, 33_278, 1150),
    "ptb_lstm_24m": (24e6, 10_001, 951),
    "ptb_mogrifier_24m": (24e6, 10_001, 912),
    "wt2_lstm_35m": (35e6, 33_279, 1211),
    "wt2_mogrifier_35m": (35e6, 33_279, 1366),
    "ptb_mogrifier_rlstm_24m": (24e6, 10_001, None),
    "wt2_mogrifier_rlstm_35m": (35e6, 33_279, None),
}


# Hidden size at 24 M parameters and LAMB's vocabulary of PTB, None where it is not published.
ABLATIONS = {
    "ablation=mogrifier": 912,
    "ablation=full_rank": 787,
    "ablation=no_zigzag": 912,
    "ablation=mlstm": None,
    "ablation=lstm": 951,
} | {f"model.rounds={i}": size for i, size in enumerate((951, 943, 935, 927, 919, 912, 904))}


def config_of(name: str, *overrides: str) -> Config:
    return validate(compose_config([f"experiment={name}", *overrides]))


@pytest.mark.parametrize("point", ABLATIONS)
def test_the_points_of_the_published_ablations_have_their_widths(point: str) -> None:
    config = config_of("ptb_ablation_24m", point)
    model = build_model(config.model, 10_001, "meta")
    assert model.num_params() == pytest.approx(24e6, rel=0.01)
    if (hidden := ABLATIONS[point]) is not None:
        assert abs(model.mask_shapes["state.0"][0] - hidden) <= 1
    assert (config.trainer.bptt, config.trainer.max_epochs) == (35, 145)


def test_an_ablation_is_laid_over_the_model_of_a_sweep() -> None:
    found = {}
    for name in ("mogrifier", "full_rank", "no_zigzag", "shared", "lstm", "mlstm"):
        m = validate(compose_config(["sweep=ptb_ablation", f"ablation={name}"])).model
        assert m.num_params == 3e6
        found[name] = (m.cell, m.rounds, m.rank, m.zigzag, m.share_rounds)
    assert found == {
        "mogrifier": ("lstm", 5, 40, True, False),
        "full_rank": ("lstm", 5, None, True, False),
        "no_zigzag": ("lstm", 5, 40, False, False),
        "shared": ("lstm", 5, 40, True, True),
        "lstm": ("lstm", 0, None, True, False),
        "mlstm": ("mlstm", 0, None, True, False),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_parameters(name: str) -> None:
    params, vocabulary, hidden = PUBLISHED[name]
    model = build_model(config_of(name).model, vocabulary, "meta")
    assert model.num_params() == pytest.approx(params, rel=0.01)
    if hidden is not None:
        assert abs(model.mask_shapes["state.0"][0] - hidden) <= 1


def test_every_recipe_states_its_command_number_cost_and_what_was_measured() -> None:
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text()
        header = "\n".join(x for x in text.splitlines() if x.startswith("#"))
        assert f"python train.py experiment={name}" in header, name
        assert "Measured" in header and "alidation" in header and "tokens" in header, name


def test_a_recipe_for_a_gpu_validates_in_many_streams() -> None:
    for name in NAMES:
        if "trainer.device=cuda" in (FOLDER / f"{name}.yaml").read_text():
            assert config_of(name).trainer.valid_batch_size >= 128, name


def train_twenty_steps(
    config: Config, folder: Path, vocabulary: int, device: str = "cpu"
) -> list[float]:
    """Gradient norms and perplexities of a recipe on random text in small batches."""
    torch.manual_seed(config.seed)
    config.trainer.batch_size, config.trainer.max_steps = 4, 20
    config.trainer.bptt, config.trainer.valid_every, config.trainer.log_every = 9, 10, 5
    model = build_model(config.model, vocabulary, device)
    ids = np.random.default_rng(0).integers(0, vocabulary, 2000).astype(np.uint16)
    train = ORDERS[config.trainer.streams](ids, config.trainer.batch_size, 0)
    Trainer(
        model=model,
        train=train,
        optimizer=build_optimizer(config.optimizer, model.parameters()),
        averaging=build_averaging(config.optimizer, model.parameters(), total_steps=20),
        regularization=config.regularization,
        config=config.trainer,
        validate=lambda: Score(nats=100.0, tokens=50, words=50, bytes=250),
        files=RunFolder(folder),
        seed=config.seed,
    ).fit()
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[k] for line in lines for k in ("train/ppl", "train/grad_norm") if k in line]


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_recipe_trains_without_a_non_finite_number(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    model = config.model
    model.rank = model.rank and 4
    model.adaptive_softmax = [20, 30][: len(model.adaptive_softmax)]
    if model.num_params is not None:
        model.num_params, model.hidden_size = None, 24
    else:
        model.hidden_size, model.embedding_size = 24, model.embedding_size and 12
        model.top_hidden_size = model.top_hidden_size and 12
    values = train_twenty_steps(config, tmp_path, 50)
    assert len(values) == 8 and all(math.isfinite(value) for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_without_a_non_finite_number(name: str, tmp_path: Path) -> None:
    """At its full size, in small batches of random text."""
    values = train_twenty_steps(config_of(name), tmp_path, PUBLISHED[name][1])
    assert len(values) == 8 and all(math.isfinite(value) for value in values)
