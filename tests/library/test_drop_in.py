"""MogrifierLSTM as a stand-in for torch.nn.LSTM, and what it adds."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mogrifier_lm
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.library.drop_in import MogrifierLSTM

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
    with pytest.warns(UserWarning, match="dropout=1.0 stands between layers"):
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
        ({"dropout": True}, "dropout is True"),
        ({"proj_size": 3}, "proj_size is 3.*not supported"),
        ({"backend": "fast"}, "backend is 'fast'.*reference"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MogrifierLSTM(**({"input_size": I, "hidden_size": H} | arguments))


@pytest.mark.parametrize("arguments", [{"round": 5}, {"cell": "rlstm"}])
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


@pytest.mark.parametrize("bias", [5, 0, None, 1.0])
def test_a_bias_that_is_no_bool_is_an_error(bias):
    """It stood where rounds once did."""
    with pytest.raises(TypeError, match=f"bias is {bias}, it must be True or False; rounds is a k"):
        MogrifierLSTM(I, H, 1, bias)


def test_a_state_of_one_tensor_is_an_error():
    with pytest.raises(TypeError, match="one tensor, expected two"):
        MogrifierLSTM(I, H)(torch.zeros(T, B, I), torch.zeros(2, 1, B, H))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype_are_those_of_the_parameters(dtype):
    layer = MogrifierLSTM(I, H, device="cpu", dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    output, (h, c) = layer(torch.randn(T, B, I, dtype=dtype))
    assert output.dtype == h.dtype == c.dtype == dtype and output.isfinite().all()
    meta = MogrifierLSTM(I, H, device="meta")
    assert all(p.is_meta for p in meta.parameters())


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("rounds", [0, 2])
def test_an_input_of_another_dtype_is_an_error(rounds, dtype, backend):
    layer = MogrifierLSTM(I, H, rounds=rounds, backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="[Ff]loat|dtype"):
        layer(torch.ones(T, B, I).to(dtype))


def test_each_direction_has_rounds_of_its_own():
    layer = MogrifierLSTM(I, H, num_layers=2, bidirectional=True, rounds=3, rank=2)
    assert "round3_left_l1_reverse" in layer.state_dict()
    for index in range(2):
        ahead, back = layer.round_matrices(index), layer.round_matrices(index, reverse=True)
        size = I if index == 0 else 2 * H
        assert [w.shape for w, _ in ahead] == [(size, H), (H, size), (size, H)]
        assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(ahead, back, strict=True))
    x = torch.randn(T, B, I)
    output, (h_n, _) = layer(x)
    assert output.shape == (T, B, 2 * H) and h_n.shape == (4, B, H)
    assert torch.equal(output[-1, :, :H], h_n[2]) and torch.equal(output[0, :, H:], h_n[3])


@each_backend
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_packed_sequence_is_each_sequence_alone(bidirectional, backend):
    layer = MogrifierLSTM(I, H, num_layers=2, bidirectional=bidirectional, backend=backend)
    sequences = [torch.randn(length, I) for length in (2, 6, 6, 1, 4)]
    h, c = states(4 if bidirectional else 2, 5)
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    output, (h_n, c_n) = layer(packed, (h, c))
    padded, lengths = nn.utils.rnn.pad_packed_sequence(output)
    for b, sequence in enumerate(sequences):
        expected, (h_b, c_b) = layer(sequence, (h[:, b], c[:, b]))
        torch.testing.assert_close(padded[: lengths[b], b], expected)
        torch.testing.assert_close((h_n[:, b], c_n[:, b]), (h_b, c_b))


@each_backend
@pytest.mark.parametrize("rounds", range(7))
def test_weights_of_the_community_version_compute_what_it_does(rounds, backend):
    """Its formulas, written down anew: products from the left, batch first."""
    shapes = {"Wih": (I, 4 * H), "Whh": (H, 4 * H), "bih": (4 * H,), "bhh": (4 * H,),
              "Q": (H, I), "R": (I, H)}  # fmt: skip
    w = {name: torch.randn(shape) / 3 for name, shape in shapes.items()}
    layer = MogrifierLSTM.from_moglstm(w, rounds, backend=backend)
    x_BTI, (h, c) = torch.randn(B, T, I), states(1, B)
    output, (h_n, c_n) = layer(x_BTI, (h, c))
    h, c = h[0], c[0]
    for t in range(T):
        x = x_BTI[:, t]
        for i in range(1, rounds + 1):
            if i % 2 == 0:
                h = 2 * torch.sigmoid(x @ w["R"]) * h
            else:
                x = 2 * torch.sigmoid(h @ w["Q"]) * x
        i, f, g, o = (x @ w["Wih"] + w["bih"] + h @ w["Whh"] + w["bhh"]).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        torch.testing.assert_close(output[:, t], h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [0, 3])
def test_weights_of_torch_lstm_are_taken_over(rounds):
    theirs = nn.LSTM(I, H, num_layers=2, batch_first=True, bidirectional=True).double()
    ours = MogrifierLSTM.from_lstm(theirs, rounds=rounds)
    assert ours.weight_hh_l1_reverse.dtype == torch.float64
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x = torch.randn(B, T, I, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.startswith("round"):
                parameter.zero_()  # gates of 1
    assert_same(ours(x), theirs(x))


def test_the_package_offers_the_layer_and_it_names_itself():
    assert mogrifier_lm.MogrifierLSTM is MogrifierLSTM
    assert "5, 7" in repr(MogrifierLSTM(I, H)) and "rounds=5" in repr(MogrifierLSTM(I, H))
