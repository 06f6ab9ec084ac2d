"""The model without gradient, as evaluators run it."""

import gc
import weakref
from typing import cast

import torch

from mogrifier_lm.cells import RecurrentLayer
from mogrifier_lm.evaluators import captured
from mogrifier_lm.evaluators.rounds import cut
from mogrifier_lm.options import ModelConfig, RegularizationConfig
from mogrifier_lm.regularization import draw_masks
from mogrifier_lm.runs.build import build_model


def test_it_is_the_models_encoding_with_masks_and_with_rounds_cut() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=8, rounds=2, num_layers=2), 11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    tokens, states = torch.randint(11, (5, 2)), model.zero_states(2)
    rates = RegularizationConfig(input_dropout=0.4, state_dropout=0.3)
    masks = draw_masks(rates, model.mask_shapes, (5, 2), torch.Generator().manual_seed(0))
    layers = cast(list[RecurrentLayer], list(model.layers))

    def values(encode, *arguments) -> list[torch.Tensor]:
        hidden, after = encode(*arguments)
        return [hidden, *(tensor for state in after for tensor in state)]

    seen, keys = [], set()
    for given in (None, masks):
        for rounds in (0, 2):
            with cut(layers, rounds), torch.no_grad():
                expected = values(model.encode, tokens, states, given)
                found = values(captured.encode, model, tokens, states, given)
                keys.add(captured._fixed(model))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            seen.append(found[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(captured._fixed(model))
    assert len(keys) == 3  # a graph for each number of rounds and each precision


def test_what_was_captured_does_not_keep_a_model_alive() -> None:
    model = build_model(ModelConfig(hidden_size=8, rounds=1), 11)
    captured.encode(model, torch.zeros(3, 1, dtype=torch.int64), model.zero_states(1))
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
