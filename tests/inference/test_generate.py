from itertools import islice

import numpy as np
import pytest
import torch

from mogrifier_lm.inference.generate import Sampling, sample
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.runs.build import build_model

V, EOS = 9, 2


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=12, rounds=3, tie_embeddings=False), V)
    with torch.no_grad():
        model.output_weight.mul_(8)  # far from uniform
    return model


def draw(
    model: LanguageModel, prompt: list[int], tokens: int, how: Sampling, eos_id: int = EOS
) -> list[int]:
    return [drawn for (drawn,) in islice(sample(model, prompt, 1, eos_id, how), tokens)]


def test_a_cold_sample_is_the_likeliest_token_given_all_before_it(model: LanguageModel) -> None:
    prompt = [4, 0, 7]
    drawn = draw(model, prompt, 12, Sampling(temperature=1e-3))
    for i, token in enumerate(drawn):
        seen = torch.tensor([EOS, *prompt, *drawn[:i]])[:, None]
        hidden, _ = model.encode(seen, model.zero_states(1))
        assert token == int((model.output_weight @ hidden[-1] + model.output_bias).argmax())
    assert len(set(drawn)) > 1


def test_the_temperature_divides_the_logits() -> None:
    model = build_model(ModelConfig(hidden_size=4, rounds=0), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output_bias.copy_(torch.tensor([0.6, 0.3, 0.1]).log())
    drawn = draw(model, [], 600, Sampling(temperature=0.5, seed=3), 0)
    expected = np.array([0.36, 0.09, 0.01]) / 0.46
    assert np.bincount(drawn, minlength=3) / 600 == pytest.approx(expected, abs=0.05)


def test_the_seed_fixes_the_sample(model: LanguageModel) -> None:
    first, again, other = (
        draw(model, [1], 30, Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_texts_side_by_side_are_drawn_each_from_its_own_past(model: LanguageModel) -> None:
    steps = list(islice(sample(model, [4], 3, EOS, Sampling(temperature=1e-3)), 10))
    alone = draw(model, [4], 10, Sampling(temperature=1e-3))
    assert [list(text) for text in zip(*steps, strict=True)] == [alone] * 3


def test_a_word_is_drawn_also_where_all_others_have_no_share_that_a_number_holds() -> None:
    log_p = torch.tensor([[0.0, -300.0, -300.5, -400.0]])
    assert Sampling(banned=[0]).probabilities(log_p.clone())[0] == pytest.approx(
        [0, 1, 0.6065, 0], abs=1e-4
    )
    for tiny in (1e-300, 1e-46):
        assert Sampling(top_p=tiny).probabilities(log_p.clone()).tolist() == [[1, 0, 0, 0]]
