"""`MogrifierLSTM` as a drop-in for torch.nn.LSTM, on every backend.

Shape legend: T time steps, B streams, D input size, H hidden size, L layers.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from mogrifier_lm.cells import MogrifierLSTM
from mogrifier_lm.kernels.recurrence import BACKENDS

T, B, D, H, L = 6, 3, 5, 7, 2

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def build(backend: str = "reference", **options) -> MogrifierLSTM:
    """A float32 layer, or a skip where the backend says that it cannot run."""
    try:
        return MogrifierLSTM(D, H, **{"num_layers": L, "backend": backend} | options)
    except ValueError as error:
        pytest.skip(str(error))


def state(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape, H), torch.randn(*shape, H)


@every_backend
@pytest.mark.parametrize("bias", [True, False])
def test_rounds_zero_is_torch_lstm_with_its_state_dict_both_ways(backend, bias):
    ours = build(backend, rounds=0, bias=bias)
    theirs = nn.LSTM(D, H, num_layers=L, bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    other = build(backend, rounds=0, bias=bias)
    other.load_state_dict(theirs.state_dict())
    x, s = torch.randn(T, B, D), state(L, B)
    expected = theirs(x, s)
    torch.testing.assert_close(ours(x, s), expected)
    torch.testing.assert_close(other(x, s), expected)


@every_backend
@pytest.mark.parametrize("given", [True, False], ids=["state given", "no state"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_shapes_and_values_are_torch_lstms_in_every_form_of_call(
    backend, batched, batch_first, given
):
    ours = build(backend, rounds=0, batch_first=batch_first)
    theirs = nn.LSTM(D, H, num_layers=L, batch_first=batch_first)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*((B, T) if batch_first else (T, B)) if batched else (T,), D)
    arguments = (x, state(L, B) if batched else state(L)) if given else (x,)
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))


@every_backend
def test_forms_of_call_agree_with_rounds(backend):
    layer = build(backend, rounds=5, rank=2)
    x, (h, c) = torch.randn(T, B, D), state(L, B)
    output, (h_n, c_n) = layer(x, (h, c))
    first = build(backend, rounds=5, rank=2, batch_first=True)
    first.load_state_dict(layer.state_dict())
    torch.testing.assert_close(first(x.transpose(0, 1), (h, c))[0].transpose(0, 1), output)
    single, (h_1, c_1) = layer(x[:, 1], (h[:, 1], c[:, 1]))
    torch.testing.assert_close(single, output[:, 1])
    torch.testing.assert_close((h_1, c_1), (h_n[:, 1], c_n[:, 1]))
    zeros = torch.zeros(L, B, H)
    torch.testing.assert_close(layer(x), layer(x, (zeros, zeros)))


@every_backend
def test_a_stack_is_its_layers_one_after_the_other(backend):
    stack = build(backend, rounds=3)
    x, (h, c) = torch.randn(T, B, D), state(L, B)
    expected, states = x, []
    for i in range(L):
        one = MogrifierLSTM(D if i == 0 else H, H, rounds=3, backend=backend)
        one.load_state_dict(
            {
                key.replace(f"_l{i}", "_l0"): value
                for key, value in stack.state_dict().items()
                if key.endswith(f"_l{i}")
            }
        )
        expected, s = one(expected, (h[i : i + 1], c[i : i + 1]))
        states.append(s)
    output, (h_n, c_n) = stack(x, (h, c))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, torch.cat([s[0] for s in states]))
    torch.testing.assert_close(c_n, torch.cat([s[1] for s in states]))


@every_backend
@pytest.mark.parametrize("rank", [None, 3])
def test_round_matrices_gate_as_documented(backend, rank):
    """One step by hand: the gating out of `round_matrices`, then torch's LSTM cell."""
    layer = build(backend, num_layers=1, rounds=5, rank=rank)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    matrices = layer.round_matrices(0)
    assert [tuple(w.shape) for w, _ in matrices] == [(D, H), (H, D), (D, H), (H, D), (D, H)]
    x, (h, c) = torch.randn(B, D), state(B)
    gated = [x, h]
    for i, (weight, bias) in enumerate(matrices):
        source, target = gated[1 - i % 2], gated[i % 2]
        gated[i % 2] = 2 * torch.sigmoid(nn.functional.linear(source, weight, bias)) * target
    cell = nn.LSTMCell(D, H)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name in cell.state_dict()})
    _, (h_1, c_1) = layer(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
    torch.testing.assert_close((h_1[0], c_1[0]), cell(gated[0], (gated[1], c)))


@every_backend
def test_shared_rounds_without_bias_are_the_community_version(backend):
    """github RMichaelSwan/MogrifierLSTM: one Q and one R in all rounds, full rank, no bias."""
    layer = build(backend, num_layers=1, rounds=5, share_rounds=True, round_bias=False)
    names = [name for name in layer.state_dict() if name.startswith("round")]
    assert names == ["round1_weight_l0", "round2_weight_l0"]
    q, r = (layer.state_dict()[name] for name in names)
    cell = nn.LSTMCell(D, H)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name in cell.state_dict()})
    x_TBI, (h, c) = torch.randn(T, B, D), state(B)
    output, _ = layer(x_TBI, (h.unsqueeze(0), c.unsqueeze(0)))
    for t in range(T):
        x = x_TBI[t]
        for i in range(1, 6):
            if i % 2:
                x = 2 * torch.sigmoid(h @ q.T) * x
            else:
                h = 2 * torch.sigmoid(x @ r.T) * h
        h, c = cell(x, (h, c))
        torch.testing.assert_close(output[t], h)


@every_backend
def test_the_capped_input_gate_bounds_the_cell_state(backend):
    capped, free = (build(backend, rounds=2, cap_input_gate=cap) for cap in (True, False))
    for parameter in free.parameters():
        nn.init.normal_(parameter, std=3)
    capped.load_state_dict(free.state_dict())
    x = torch.randn(40, B, D)
    assert capped(x)[1][1].abs().max() <= 1 < free(x)[1][1].abs().max()


@every_backend
def test_autocast_runs_products_in_bf16_and_keeps_gradients_fp32(backend):
    layer = build(backend, rounds=5)
    x = torch.randn(T, B, D)
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
    output.float().sum().backward()
    error = (output.float() - exact).abs().max()
    assert 1e-5 < error < 2e-2
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )


@every_backend
def test_dropout_stands_between_layers_in_training_mode_only(backend):
    layer = build(backend, rounds=2, dropout=1.0)
    x = torch.randn(T, B, D)
    changed = torch.randn(T, B, D)
    torch.testing.assert_close(layer(x)[0], layer(changed)[0])
    _, (h_n, _) = layer(x)
    assert not torch.equal(h_n[0], layer(changed)[1][0][0])
    layer.eval()
    plain = build(backend, rounds=2)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])
    one = build(backend, num_layers=1, dropout=1.0)
    assert (one(x)[0] != 0).all()


@every_backend
def test_copies_pickles_and_double_compute_the_same(backend):
    layer = build(backend, rounds=5, rank=2)
    x = torch.randn(T, B, D)
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])
def test_double_computes_the_same_more_exactly(backend):
    layer = build(backend, rounds=5, rank=2)
    x = torch.randn(T, B, D)
    output = layer(x)[0]
    twin = copy.deepcopy(layer).double()
    assert twin(x.double())[0].dtype == torch.float64
    torch.testing.assert_close(twin(x.double())[0].float(), output)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_size": 0}, "input_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"rounds": -1}, "rounds"),
        ({"rank": 6}, "rank"),
        ({"dropout": 1.5}, "dropout"),
        ({"backend": "magic"}, "backend"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        MogrifierLSTM(**{"input_size": D, "hidden_size": H} | options)


@pytest.mark.parametrize(
    "x_shape, h_shape, c_shape, message",
    [
        ((T, B, D + 1), (L, B, H), (L, B, H), "x has shape"),
        ((D,), (L, B, H), (L, B, H), "x has shape"),
        ((T, B, D), (L, B + 1, H), (L, B, H), "h_0 has shape"),
        ((T, B, D), (L, B, H), (1, B, H), "c_0 has shape"),
        ((T, D), (L, H + 1), (L, H), "h_0 has shape"),
        ((T, D), (L, 1, H), (L, 1, H), "h_0 has shape"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_it(x_shape, h_shape, c_shape, message):
    layer = build()
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(x_shape), (torch.randn(h_shape), torch.randn(c_shape)))


def test_a_packed_sequence_is_refused_with_advice():
    with pytest.raises(TypeError, match="PackedSequence.*pad"):
        build()(pack_sequence([torch.randn(4, D), torch.randn(2, D)]))
