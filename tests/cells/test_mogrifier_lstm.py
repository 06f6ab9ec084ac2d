"""MogrifierLSTM as a stand-in for torch.nn.LSTM, and what it adds."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mogrifier_lm
from mogrifier_lm.cells import MogrifierLSTM
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve

I, H, T, B = 5, 7, 6, 3  # noqa: E741


def runs(backend: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `backend` can run on this machine."""
    try:
        resolve(backend, "cpu", dtype=dtype)
    except ValueError:
        return False
    return True


HERE = [name for name in BACKENDS if runs(name)]
each_backend = pytest.mark.parametrize("backend", HERE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def states(layers: int, *batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(layers, *batch, H), torch.randn(layers, *batch, H)


def assert_same(ours, theirs) -> None:
    """(output, (h, c)) of two layers."""
    torch.testing.assert_close((ours[0], *ours[1]), (theirs[0], *theirs[1]))


@each_backend
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("layers, bias", [(1, True), (3, True), (2, False)])
def test_zero_rounds_are_torch_lstm(layers, bias, batched, batch_first, given, backend):
    options = {"num_layers": layers, "bias": bias, "batch_first": batch_first}
    theirs = nn.LSTM(I, H, **options)
    ours = MogrifierLSTM(I, H, rounds=0, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*((B, T) if batch_first else (T, B)), I) if batched else torch.randn(T, I)
    arguments = (x, states(layers, *([B] if batched else []))) if given else (x,)
    assert_same(ours(*arguments), theirs(*arguments))


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_zero_rounds_is_torch_lstms_both_ways(bias):
    theirs = nn.LSTM(I, H, num_layers=2, bias=bias)
    ours = MogrifierLSTM(I, H, num_layers=2, bias=bias, rounds=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I)
    assert_same(ours(x), theirs(x))


def test_zero_rounds_are_initialised_as_torch_lstm():
    bound = H**-0.5
    for name, parameter in MogrifierLSTM(I, H, rounds=0).named_parameters():
        assert -bound <= parameter.min() < 0 < parameter.max() <= bound, name


@each_backend
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence_and_batch_first_are_the_same_computation(batch_first, backend):
    layer = MogrifierLSTM(I, H, num_layers=2, batch_first=batch_first, backend=backend)
    x, (h, c) = torch.randn(T, B, I), states(2, B)
    output, (h_n, c_n) = layer(x.transpose(0, 1) if batch_first else x, (h, c))
    output = output.transpose(0, 1) if batch_first else output
    assert output.shape == (T, B, H) and h_n.shape == c_n.shape == (2, B, H)
    assert torch.equal(output[-1], h_n[-1])
    assert_same(layer(x[:, 1], (h[:, 1], c[:, 1])), (output[:, 1], (h_n[:, 1], c_n[:, 1])))


@each_backend
def test_the_default_state_is_zero(backend):
    layer = MogrifierLSTM(I, H, num_layers=2, backend=backend)
    x, zeros = torch.randn(T, B, I), torch.zeros(2, B, H)
    assert_same(layer(x), layer(x, (zeros, zeros)))


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 1},
        {"rounds": 5},
        {"rounds": 4, "rank": 2},
        {"rounds": 5, "zigzag": False},
        {"rounds": 5, "share_rounds": True, "rank": 3},
        {"rounds": 2, "round_bias": False},
    ],
    ids=str,
)
def test_round_matrices_reproduce_a_step(options, backend):
    layer = MogrifierLSTM(I, H, num_layers=2, backend=backend, **options)
    for name, parameter in layer.named_parameters():
        if name.startswith("round"):
            nn.init.normal_(parameter)
    x_in, (h_n, c_n) = torch.randn(B, I), states(2, B)
    _, (h_out, c_out) = layer(x_in.unsqueeze(0), (h_n, c_n))
    for index in range(2):
        matrices = layer.round_matrices(index)
        assert len(matrices) == options["rounds"]
        x, h = x0, h0 = x_in, h_n[index]
        zigzag = options.get("zigzag", True)
        for i, (weight, bias) in enumerate(matrices, start=1):
            assert (bias is None) == (not options.get("round_bias", True))
            if i % 2:
                x = 2 * torch.sigmoid(nn.functional.linear(h if zigzag else h0, weight, bias)) * x
            else:
                h = 2 * torch.sigmoid(nn.functional.linear(x if zigzag else x0, weight, bias)) * h
        cell = nn.LSTMCell(x.shape[1], H)
        cell.load_state_dict(
            {name: getattr(layer, f"{name}_l{index}") for name in cell.state_dict()}
        )
        expected = cell(x, (h, c_n[index]))
        torch.testing.assert_close((h_out[index], c_out[index]), expected)
        x_in = h_out[index]


@each_backend
def test_the_community_version_is_an_option(backend):
    """github RMichaelSwan/MogrifierLSTM: one Q and one R for all rounds, full rank, no bias."""
    layer = MogrifierLSTM(I, H, rounds=5, share_rounds=True, round_bias=False, backend=backend)
    q, r = nn.Linear(H, I, bias=False), nn.Linear(I, H, bias=False)
    layer.load_state_dict(
        layer.state_dict() | {"round1_weight_l0": q.weight, "round2_weight_l0": r.weight}
    )
    assert sum(name.startswith("round") for name in layer.state_dict()) == 2
    cell = nn.LSTMCell(I, H)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name in cell.state_dict()})
    x_TBI, (h, c) = torch.randn(T, B, I), (torch.randn(B, H), torch.randn(B, H))
    output, _ = layer(x_TBI, (h.unsqueeze(0), c.unsqueeze(0)))
    for t, x in enumerate(x_TBI):
        for i in range(1, 6):
            if i % 2 == 0:
                h = (2 * torch.sigmoid(r(x))) * h
            else:
                x = (2 * torch.sigmoid(q(h))) * x
        h, c = cell(x, (h, c))
        torch.testing.assert_close(output[t], h)


@each_backend
def test_the_cap_keeps_the_cell_state_within_one(backend):
    layer = MogrifierLSTM(I, H, cap_input_gate=True, backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 10
        _, (_, c) = layer(torch.randn(50, B, I))
        assert c.abs().max() <= 1
        uncapped = MogrifierLSTM(I, H, backend=backend)
        uncapped.load_state_dict(layer.state_dict())
        _, (_, c) = uncapped(torch.randn(50, B, I))
        assert c.abs().max() > 1


@each_backend
def test_dropout_stands_between_layers_in_training_mode_only(backend):
    layer = MogrifierLSTM(I, H, num_layers=2, dropout=1.0, backend=backend)
    plain = MogrifierLSTM(I, H, num_layers=2, backend=backend)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    output, (h, _) = layer(x)
    assert_same(layer.eval()(x), plain(x))
    # At rate 1 the second layer sees zeros, and the outputs of neither layer are dropped.
    assert torch.equal(h[0], plain(x)[1][0][0])
    assert torch.equal(output, layer.train()(torch.randn(T, B, I))[0])
    assert output.abs().min() > 0
    single = MogrifierLSTM(I, H, dropout=1.0, backend=backend)
    assert single(x)[0].abs().min() > 0


@each_backend
def test_autocast_runs_products_in_bf16_and_keeps_the_state_in_float32(backend):
    layer = MogrifierLSTM(I, H, num_layers=2, backend=backend)
    x = torch.randn(T, B, I)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c) = layer(x)
    output.float().sum().backward()
    assert c.dtype == torch.float32
    assert 1e-5 < (output - exact).abs().max() < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("backend", ["auto", *(b for b in HERE if runs(b, torch.float64))])
def test_double_computes_in_float64(backend):
    layer = MogrifierLSTM(I, H, backend=backend).double()
    output, (h, c) = layer(torch.randn(T, B, I, dtype=torch.float64))
    assert output.dtype == h.dtype == c.dtype == torch.float64


@each_backend
def test_a_deep_copy_computes_the_same_and_shares_nothing(backend):
    layer, x = MogrifierLSTM(I, H, backend=backend), torch.randn(T, B, I)
    output, _ = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x)[0], output)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x)[0], output)
    assert (twin(x)[0] == 0).all()


@each_backend
def test_a_changed_weight_is_seen_at_the_next_call(backend):
    """Whatever a backend prepares of the weights, an optimizer changes them in place."""
    layer, x = MogrifierLSTM(I, H, backend=backend), torch.randn(T, B, I)
    with torch.no_grad():
        layer(x)
        layer.weight_hh_l0.add_(0.5)
        layer.round1_weight_l0.add_(0.5)
        fresh = MogrifierLSTM(I, H, backend=backend)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x)[0], fresh(x)[0])


def test_every_parameter_gets_a_gradient():
    layer = MogrifierLSTM(I, H, num_layers=2, rank=2)
    layer(torch.randn(T, B, I))[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_gates_start_near_one():
    for _, bias in MogrifierLSTM(I, H).round_matrices():
        assert (bias == 0).all()
    for rank in (None, 4):
        layer = MogrifierLSTM(200, 300, rounds=2, rank=rank)
        for weight, _ in layer.round_matrices():
            fan_in = weight.shape[1]
            assert weight.std().item() == pytest.approx((1 / fan_in) ** 0.5, rel=0.3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"input_size": -1}, "input_size is -1"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"rank": 6}, "rank is 6.*between 1 and 5"),
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"backend": "fast"}, "backend is 'fast'.*reference"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MogrifierLSTM(**({"input_size": I, "hidden_size": H} | arguments))


@pytest.mark.parametrize("arguments", [{"round": 5}, {"bidirectional": True}, {"proj_size": 3}])
def test_an_unknown_argument_is_an_error(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        MogrifierLSTM(I, H, **arguments)


@pytest.mark.parametrize(
    "x_shape, state_shape, message",
    [
        ((T, B, I + 1), None, r"x has shape \(6, 3, 6\).*size 5"),
        ((I,), None, r"x has shape \(5,\)"),
        ((T, 1, B, I), None, r"x has shape \(6, 1, 3, 5\)"),
        ((T, B, I), (1, B + 1, H), r"h_0 has shape \(1, 4, 7\), expected \(1, 3, 7\)"),
        ((T, B, I), (1, B, H + 1), r"h_0 has shape \(1, 3, 8\), expected \(1, 3, 7\)"),
        ((T, B, I), (2, B, H), r"h_0 has shape \(2, 3, 7\), expected \(1, 3, 7\)"),
        ((T, B, I), (B, H), r"h_0 has shape \(3, 7\), expected \(1, 3, 7\)"),
        ((T, I), (1, B, H), r"h_0 has shape \(1, 3, 7\), expected \(1, 7\)"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_named(x_shape, state_shape, message):
    state = None if state_shape is None else (torch.zeros(state_shape), torch.zeros(state_shape))
    with pytest.raises(ValueError, match=message):
        MogrifierLSTM(I, H)(torch.zeros(x_shape), state)


def test_no_time_steps_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(0, 3, 5\)"):
        MogrifierLSTM(I, H)(torch.zeros(0, B, I))


def test_a_wrong_cell_state_is_named():
    with pytest.raises(ValueError, match="c_0 has shape"):
        MogrifierLSTM(I, H)(torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, I)))


def test_a_packed_sequence_is_refused_with_what_to_do():
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(T, B, I), [6, 4, 2])
    with pytest.raises(TypeError, match="PackedSequence.*pad"):
        MogrifierLSTM(I, H)(packed)


def test_the_package_offers_the_layer_and_it_names_itself():
    assert mogrifier_lm.MogrifierLSTM is MogrifierLSTM
    assert "5, 7" in repr(MogrifierLSTM(I, H)) and "rounds=5" in repr(MogrifierLSTM(I, H))
