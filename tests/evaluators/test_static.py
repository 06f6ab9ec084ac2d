import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mogrifier_lm.data import Split
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.evaluators.static import Static, static_nats
from mogrifier_lm.evaluators.task import Task, Text, evaluate
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.runs.build import build_model

V, N = 31, 203


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(hidden_size=12, rounds=3), V)


@pytest.fixture(scope="module")
def split() -> Split:
    ids = np.random.default_rng(0).integers(0, V, N).astype(np.uint16)
    return Split(ids=ids, words=190, bytes=1000, sha256="")


def score(model: LanguageModel, split: Split, batch_size: int = 1, window: int = 64) -> Score:
    return Text("valid", split).score(static_nats(model, split.ids, 0, batch_size, window))


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_the_window_does_not_change_the_score(
    model: LanguageModel, split: Split, window: int
) -> None:
    assert score(model, split, window=window).nats == pytest.approx(
        score(model, split, window=N).nats, rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_token_is_scored_at_any_batch_size(
    model: LanguageModel, split: Split, batch_size: int
) -> None:
    found = score(model, split, batch_size)
    assert (found.tokens, found.words, found.bytes) == (N, 190, 1000)
    for parameter in (uniform := build_model(ModelConfig(hidden_size=4), V)).parameters():
        torch.nn.init.zeros_(parameter)
    assert score(uniform, split, batch_size).nats == pytest.approx(N * math.log(V), rel=1e-6)


def by_hand(model: LanguageModel, split: Split, temperature: float = 1.0) -> torch.Tensor:
    """An <eos> is fed before the first token; the state is carried to the end."""
    tokens = torch.from_numpy(split.ids.astype(np.int64))[:, None]
    inputs = torch.cat([torch.zeros(1, 1, dtype=torch.int64), tokens[:-1]])
    with torch.no_grad():
        hidden, _ = model.encode(inputs, model.zero_states(1))
        logits = hidden @ model.output_weight.T + model.output_bias
    return torch.nn.functional.cross_entropy(logits / temperature, tokens[:, 0], reduction="none")


def test_the_score_is_one_pass_by_hand(model: LanguageModel, split: Split) -> None:
    assert score(model, split).nats == pytest.approx(by_hand(model, split).sum().item(), rel=1e-6)


def test_nats_are_in_the_order_of_the_text(model: LanguageModel, split: Split) -> None:
    def nats(batch_size: int) -> torch.Tensor:
        config = Static(batch_size=batch_size, window=10)
        results, trials = evaluate("static", config,
                                   Task(model, {"test": split}, 0), ["test"])  # fmt: skip
        assert not trials
        return results["test"].evaluation.nats

    torch.testing.assert_close(nats(1), by_hand(model, split))
    streams = nats(4)  # of 51, 51, 51 and 50 tokens, each with a state of its own
    torch.testing.assert_close(streams[:51], nats(1)[:51])
    assert len(streams) == N and not streams[51:60].allclose(nats(1)[51:60])


@pytest.mark.parametrize("temperatures", [[1.0, 0.3], [0.5, 2.0, 1.0]])
def test_the_temperature_is_tuned_on_validation_alone(
    model: LanguageModel, split: Split, temperatures: Sequence[float]
) -> None:
    valid = Split(ids=split.ids[::-1].copy(), words=190, bytes=1000, sha256="")
    results, trials = evaluate(
        "static", Static(temperature=list(temperatures)),
        Task(model, {"valid": valid, "test": split}, 0), ["test"],
    )  # fmt: skip
    nats = {t: by_hand(model, valid, t).mean().item() for t in temperatures}
    best = min(nats, key=nats.__getitem__)
    assert {t["temperature"]: t["valid_nats"] for t in trials} == pytest.approx(nats, rel=1e-5)
    entry = results["test"].to_dict()
    assert entry["temperature"] == best
    assert entry["nats"] == pytest.approx(by_hand(model, split, best).sum().item(), rel=1e-5)


def test_perplexity_is_per_word_from_sums_divided_once() -> None:
    assert Score(nats=20.0, tokens=9, words=10, bytes=50).ppl == pytest.approx(math.exp(2))
    assert Score(nats=1e6, tokens=1, words=1, bytes=1).ppl == math.inf
