import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mogrifier_lm.data import IGNORE
from mogrifier_lm.errors import UserError
from mogrifier_lm.kernels import cross_entropy
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import ModelConfig, RegularizationConfig
from mogrifier_lm.regularization import activation_penalty, draw_masks, of_streams
from mogrifier_lm.runs.build import build_model

VARIANTS: dict[str, dict[str, Any]] = {
    "lstm": {"rounds": 0},
    "mogrifier": {"rounds": 5},
    "low rank, untied": {"rounds": 4, "rank": 3, "tie_embeddings": False},
    "projected, skip sum": {"rounds": 2, "embedding_size": 6, "skip_sum": True},
    "residual": {"rounds": 1, "residual": True},
    "top layer of the embedding's size": {"rounds": 1, "embedding_size": 6, "top_hidden_size": 6},
    "mixture of softmaxes": {"rounds": 1, "embedding_size": 6, "mixture": 3},
    "shared, no zigzag": {"rounds": 3, "share_rounds": True, "zigzag": False},
}
V = 23


def rates(**kinds: float) -> RegularizationConfig:
    return RegularizationConfig(**{f"{kind}_dropout": rate for kind, rate in kinds.items()})


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(hidden_size=10, **VARIANTS[request.param]), V)


def window(num_steps: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (num_steps + 1, batch_size), generator=generator)
    return tokens[:-1], tokens[1:]


def test_changing_a_token_changes_no_score_before_it(model: LanguageModel) -> None:
    inputs, targets = window(12, 2)
    nats, _ = model.token_nats(inputs, targets, model.zero_states(2))
    changed = inputs.clone()
    changed[7] = (changed[7] + 1) % V
    other, _ = model.token_nats(changed, targets, model.zero_states(2))
    assert torch.equal(nats[:7], other[:7])
    assert (nats[7:] != other[7:]).any()


def test_two_windows_with_carried_state_equal_one(model: LanguageModel) -> None:
    inputs, targets = window(12, 3)
    whole, end = model.token_nats(inputs, targets, model.zero_states(3))
    first, states = model.token_nats(inputs[:5], targets[:5], model.zero_states(3))
    second, states = model.token_nats(inputs[5:], targets[5:], states)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(states, end)


def test_loss_is_the_sum_of_the_token_nats(model: LanguageModel) -> None:
    inputs, targets = window(9, 3)
    targets[-1, 1:] = IGNORE
    nats, _ = model.token_nats(inputs, targets, model.zero_states(3))
    loss, _ = model.loss(inputs, targets, model.zero_states(3))
    assert (nats[-1] == 0).tolist() == [False, True, True]
    torch.testing.assert_close(loss, nats.sum())


def test_each_stream_stands_for_itself(model: LanguageModel) -> None:
    inputs, targets = window(6, 3)
    together, _ = model.token_nats(inputs, targets, model.zero_states(3))
    alone, _ = model.token_nats(inputs[:, 1:2], targets[:, 1:2], model.zero_states(1))
    torch.testing.assert_close(together[:, 1:2], alone)


def test_a_model_of_zeros_scores_ln_v_a_token(model: LanguageModel) -> None:
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    nats, _ = model.token_nats(*window(6, 2), model.zero_states(2))
    torch.testing.assert_close(nats, torch.full((6, 2), math.log(V)))


def test_masks_alone_decide_on_dropout(model: LanguageModel) -> None:
    inputs, targets = window(6, 2)
    states = model.zero_states(2)
    model.train()
    plain, _ = model.loss(inputs, targets, states)
    model.eval()
    assert torch.equal(model.loss(inputs, targets, states)[0], plain)
    generator = torch.Generator().manual_seed(0)
    for kind in ("embedding", "input", "inter_layer", "state", "output", "weight"):
        masks = draw_masks(rates(**{kind: 0.5}), model.mask_shapes, (6, 2), generator)
        assert not torch.equal(model.loss(inputs, targets, states, masks)[0], plain), kind


def test_masks_keep_the_mean_and_are_shared_over_time_unless_per_step() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(["input", "inter_layer.0", "state.0", "state.1", "output"], (1000,))
    of = rates(input=0.3, inter_layer=0.3, state=0.3, output=0.3)
    locked = draw_masks(of, shapes, (5, 4), generator)
    stepped = draw_masks(replace(of, per_step=True), shapes, (5, 4), generator)
    assert list(locked) == list(stepped) == list(shapes)
    for mask in (*locked.values(), stepped.pop("state.0"), stepped.pop("state.1")):
        assert mask.shape == (1, 4, 1000)
        assert mask.mean().item() == pytest.approx(1, abs=0.05)
        assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
    for mask in stepped.values():
        assert mask.shape == (5, 4, 1000)
        assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize(
    ("rank", "sizes"),
    [
        (84, [951, 943, 935, 927, 919, 912, 904]),
        (None, [951, 909, 873, 841, 812, 787, 763]),
    ],
)
def test_a_budget_of_24m_gives_the_published_hidden_sizes(
    rank: int | None, sizes: list[int]
) -> None:
    for rounds, size in enumerate(sizes):
        config = ModelConfig(num_params=24e6, rounds=rounds, rank=rank if rounds else None)
        model = build_model(config, 10_001, "meta")
        assert abs(model.mask_shapes["state.0"][0] - size) <= 1
        assert model.num_params() <= 24e6


def test_parameter_count_is_the_formula() -> None:
    h, k, v = 30, 4, V
    for rounds in range(7):
        specs = layer_specs([h, h, h], rounds=rounds, rank=k)
        expected = v * h + v + 2 * (8 * h * h + 4 * h + rounds * (2 * h * k + h))
        assert LanguageModel(v, h, specs).num_params() == expected


def test_tied_models_have_one_matrix_and_train_it_from_both_ends() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=10, rounds=1), V)
    assert sum(p.shape == (V, 10) for p in model.parameters()) == 1
    inputs = torch.tensor([[1], [2]])
    loss, _ = model.loss(inputs, torch.tensor([[2], [3]]), model.zero_states(1))
    loss.backward()
    assert model.embedding_weight.grad is not None
    assert (model.embedding_weight.grad.abs().sum(1) > 0).all()  # unseen words: the softmax


@pytest.mark.parametrize("cell", ["lstm", "rlstm", "mlstm"])
def test_weight_dropout_is_an_explicitly_masked_weight(cell: str) -> None:
    """The loss is that of masked weights, the raw weight gets masked gradients, whatever cell."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=10, rounds=2, cell=cell)
    model, masked_model = build_model(config, V), build_model(config, V)
    masks = draw_masks(
        rates(weight=0.5), model.mask_shapes, (6, 2), torch.Generator().manual_seed(0)
    )
    masked_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, mask in zip(masked_model.layers, masks.values(), strict=True):
            assert mask.shape == layer.weight_hh.shape
            layer.weight_hh.mul_(mask)
    inputs, targets = window(6, 2)
    nats, _ = model.loss(inputs, targets, model.zero_states(2), masks)
    expected, _ = masked_model.loss(inputs, targets, masked_model.zero_states(2))
    torch.testing.assert_close(nats, expected)
    nats.backward()
    expected.backward()
    for layer, other, mask in zip(model.layers, masked_model.layers, masks.values(), strict=True):
        torch.testing.assert_close(layer.weight_hh.grad, other.weight_hh.grad * mask)
        torch.testing.assert_close(layer.weight_ih.grad, other.weight_ih.grad)


def test_embedding_dropout_drops_whole_words_of_the_input_alone() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=10, rounds=0), V)
    mask = torch.full((V, 1), 2.0)
    mask[3] = 0
    inputs, targets = window(6, 2)
    inputs[2, 1] = 3
    nats, _ = model.loss(inputs, targets, model.zero_states(2), {"embedding": mask})
    untied = build_model(ModelConfig(hidden_size=10, rounds=0, tie_embeddings=False), V)
    untied.load_state_dict(
        model.state_dict()
        | {
            "embedding_weight": model.embedding_weight * mask,
            "output_weight_untied": model.embedding_weight,
        }
    )
    torch.testing.assert_close(nats, untied.loss(inputs, targets, untied.zero_states(2))[0])


def test_activation_penalty_is_awd_lstms() -> None:
    output, dropped = torch.randn(7, 3, 5), torch.randn(7, 3, 5)
    expected = 2 * (dropped**2).mean() + 0.5 * ((output[1:] - output[:-1]) ** 2).mean()
    torch.testing.assert_close(activation_penalty(output, dropped, 2, 0.5), expected)
    assert activation_penalty(output[:1], dropped[:1], 0, 1) == 0


def test_log_probs_sum_to_one_and_hold_the_token_nats(model: LanguageModel) -> None:
    inputs, targets = window(9, 3)
    hidden, _ = model.encode(inputs, model.zero_states(3))
    for temperature in (1.0, 0.7):
        log_p = model.log_probs(hidden, temperature)
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(27))
        nats = model.output_nats(hidden, targets.flatten(), temperature)
        torch.testing.assert_close(-log_p.gather(1, targets.view(-1, 1)).squeeze(1), nats)


def test_multi_sample_objective_is_the_log_of_the_mean_probability(model: LanguageModel) -> None:
    inputs, targets = window(6, 2)
    masks = draw_masks(
        rates(input=0.5, state=0.5, output=0.5),
        model.mask_shapes,
        (6, 6),
        torch.Generator().manual_seed(0),
    )
    hidden, _ = model.encode(inputs.repeat_interleave(3, dim=1), model.zero_states(6), masks)
    found = model.output_loss(hidden, targets.flatten(), samples=3)
    # The same three passes one after the other: stream b of sample d is column 3 b + d.
    passes = []
    for d in range(3):
        of_pass = of_streams(masks, slice(d, None, 3))
        nats, _ = model.token_nats(inputs, targets, model.zero_states(2), of_pass)
        passes.append(-nats)
    expected = -(torch.stack(passes).logsumexp(0) - math.log(3)).sum()
    torch.testing.assert_close(found, expected)
    plain, _ = model.encode(inputs, model.zero_states(2))
    assert torch.equal(
        model.output_loss(plain, targets.flatten(), samples=1),
        model.loss(inputs, targets, model.zero_states(2))[0],
    )


def test_residual_adds_each_layers_input_to_its_output() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=10, rounds=0, residual=True), V)
    inputs, _ = window(6, 2)
    x = model.embedding_weight[inputs]
    mask = torch.rand(1, 2, 10)
    first, _ = model.layers[0](x, model.zero_states(2)[0])
    x = x + first * mask
    second, _ = model.layers[1](x, model.zero_states(2)[1])
    found, _ = model.outputs(inputs, model.zero_states(2), {"inter_layer.0": mask})
    torch.testing.assert_close(found, x + second)


def test_melis2020_and_chrono_initial_values() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(hidden_size=400, rounds=0, init="melis2020", chrono_t_max=50), V
    )
    layer = model.layers[0]
    # A normal truncated at two deviations has 0.88 of the deviation.
    assert layer.weight_ih.std().item() == pytest.approx(0.88 * math.sqrt(1.3 / 400), rel=0.02)
    i, f, g, o = layer.bias.chunk(4)
    assert torch.equal(i, -f) and not g.any() and not o.any()
    times = f.exp()
    assert 1 <= times.min() < 4 and 46 < times.max() <= 49
    assert times.mean().item() == pytest.approx(25, abs=2)


def test_the_output_layers_kernel_is_chosen_once_and_again_with_another_dtype():
    model = build_model(ModelConfig(hidden_size=8), V)
    assert model.output_backend == cross_entropy.resolve("auto", "cpu")
    assert model.double().output_backend == "chunked"
    assert build_model(ModelConfig(hidden_size=8, backend="fused"), V).output_backend == (
        cross_entropy.resolve("auto", "cpu")
    )


def test_the_reference_backend_runs_the_definitions_everywhere(monkeypatch):
    model = build_model(ModelConfig(hidden_size=8, backend="reference"), V)
    assert (model.backend, model.output_backend) == ("reference", "reference")
    for name in ("chunked", "native"):
        monkeypatch.delitem(cross_entropy.BACKENDS, name)
    inputs, targets = window(5, 2)
    model.loss(inputs, targets, model.zero_states(2))[0].backward()
    model.token_nats(inputs, targets, model.zero_states(2))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_cannot_run_is_an_error_of_its_key(backend):
    with pytest.raises(UserError, match=f"^model.backend is {backend}: the {backend} backend"):
        build_model(ModelConfig(hidden_size=8, cell="mlstm", backend=backend), V)
