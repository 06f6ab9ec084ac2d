"""The recurrence under what torch does to functions: derivatives, compilers, wrong arguments."""

import pytest
import torch
from torch import Tensor, nn

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from tests.kernels.test_recurrence import EXACT, FAST, HERE, OPTIONS, error, problem, runs

each_backend = pytest.mark.parametrize("backend", HERE)
each_fast_backend = pytest.mark.parametrize("backend", FAST)
SOME = ["lstm capped", "mogrifier", "low rank", "no zigzag", "mogrifier mlstm", "mogrifier rlstm"]
a_trace = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
each_case = pytest.mark.parametrize(
    "option, backend", [(o, b) for o in SOME for b in FAST if runs(b, o)]
)


def penalised(option: str, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of a loss that holds the norms of other gradients."""
    case = problem(option, dtype=dtype)
    inputs = list(case.inputs().values())
    output, h, c = case.run(backend)
    first = torch.autograd.grad(
        [output.sum() + (c * c).sum()], inputs, create_graph=True, allow_unused=True
    )
    loss = output.square().sum() + sum(g.square().sum() for g in first if g is not None)
    return [d.double() for d in torch.autograd.grad(loss, inputs)]


@each_case
def test_a_second_derivative_is_the_references(option, backend):
    exact = penalised(option, "reference", torch.float64)
    for value, expected in zip(penalised(option, backend, torch.float32), exact, strict=True):
        assert error(value, expected) <= EXACT[torch.float32]


@pytest.mark.parametrize("option", ["mogrifier", "low rank", "mogrifier rlstm"])
def test_second_derivatives_pass_gradgradcheck(option):
    case = problem(option, sizes=(2, 2, 3, 4))
    tensors = [case.x, case.h, case.c, case.parameters["weight_hh"]]

    def outputs(x: Tensor, h: Tensor, c: Tensor, hh: Tensor) -> tuple[Tensor, ...]:
        case.x, case.h, case.c, case.parameters["weight_hh"] = x, h, c, hh
        return case.run("fused")

    torch.manual_seed(0)
    assert torch.autograd.gradgradcheck(outputs, tensors, fast_mode=True)


def layers(backend: str, rounds: int = 3) -> tuple[RecurrentLayer, RecurrentLayer]:
    """One of the backend, and one of the reference with the same weights."""
    torch.manual_seed(0)
    spec = CellSpec(input_size=5, hidden_size=16, rounds=rounds, rank=2)
    ours, reference = RecurrentLayer(spec, backend), RecurrentLayer(spec, "reference")
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def arguments(T: int = 6, B: int = 3) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(T, B, 5), (torch.randn(B, 16), torch.randn(B, 16))


@each_backend
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_layer_has_no_graph_break_and_the_same_gradients(backend, precision):
    layer, _ = layers(backend)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, state = arguments()
    results = []
    for function in (layer, compiled):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output, (h, c) = function(inputs[0], state)
        loss = output.square().sum() + (h * c).sum()
        results.append([output, h, c, *torch.autograd.grad(loss, inputs)])
    rtol = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(*results, rtol=rtol, atol=rtol)


@each_backend
def test_an_exported_program_computes_what_the_layer_does(backend):
    layer, reference = layers(backend)
    program = torch.export.export(layer, arguments()).module()
    x, state = arguments()
    torch.testing.assert_close(program(x, state), reference(x, state))


@a_trace
@each_fast_backend
def test_a_trace_holds_for_other_inputs_and_numbers_of_steps(backend):
    layer, reference = layers(backend)
    with torch.no_grad():
        traced = torch.jit.trace(layer, arguments())
        for T, B in ((6, 3), (9, 2), (1, 1)):
            x, state = arguments(T, B)
            torch.testing.assert_close(traced(x, state), reference(x, state))


@a_trace
def test_a_trace_of_the_reference_is_refused():
    _, reference = layers("reference")
    with pytest.raises(RuntimeError, match="torch.jit.trace would fix the number of steps"):
        torch.jit.trace(reference, arguments())


@each_backend
def test_torch_func_is_right_or_refused_by_name(backend):
    layer, reference = layers(backend)
    x, state = arguments()

    def uses(function) -> list[Tensor]:
        return [
            torch.func.grad(lambda x: function(x, state)[0].square().sum())(x),
            torch.func.jacrev(lambda x: function(x, state)[0].sum(0))(x),
            torch.func.vmap(lambda x: function(x, state)[0])(torch.stack((x, 2 * x))),
        ]

    if backend == "reference":
        (gradient,) = torch.autograd.grad(layer(x.requires_grad_(), state)[0].square().sum(), x)
        torch.testing.assert_close(uses(layer)[0], gradient)
        return
    with pytest.raises(RuntimeError, match=f"the {backend} backend.*torch.func.*'reference' does"):
        uses(layer)


WRONG = {
    "float64 x": lambda a: a | {"x": a["x"].double()},
    "float16 x": lambda a: a | {"x": a["x"].half()},
    "int64 x": lambda a: a | {"x": a["x"].long()},
    "float64 h": lambda a: a | {"h": a["h"].double()},
    "float16 c": lambda a: a | {"c": a["c"].half()},
    "a wider x": lambda a: a | {"x": torch.cat([a["x"], a["x"]], 2)},
    "h of another batch": lambda a: a | {"h": a["h"][:2]},
    "c of another size": lambda a: a | {"c": a["c"][:, :9]},
    "c with a step": lambda a: a | {"c": a["c"][None]},
    "no steps": lambda a: a | {"x": a["x"][:0]},
    "x on meta": lambda a: a | {"x": a["x"].to("meta")},
    "h on meta": lambda a: a | {"h": a["h"].to("meta")},
    "sparse x": lambda a: a | {"x": a["x"].to_sparse()},
    "a mask of another size": lambda a: a | {"mask": torch.ones(1, 3, 15)},
    "a mask of other steps": lambda a: a | {"mask": torch.ones(5, 3, 16)},
    "a float64 mask": lambda a: a | {"mask": torch.ones(1, 3, 16).double()},
    "a mask that wants a gradient": lambda a: a | {"mask": torch.ones(1, 3, 16).requires_grad_()},
}


@each_fast_backend
@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_an_error_and_not_a_number(wrong, backend):
    layer, _ = layers(backend)
    x, (h, c) = arguments()
    a = WRONG[wrong]({"x": x, "h": h, "c": c, "mask": None})
    with pytest.raises((ValueError, RuntimeError)):
        layer(a["x"], (a["h"], a["c"]), a["mask"])


@each_fast_backend
@pytest.mark.parametrize("name", ["weight_ih", "bias", "round1_left", "round2_right"])
@pytest.mark.parametrize("change", ["dtype", "size", "device"])
def test_a_weight_that_does_not_fit_is_an_error(change, name, backend):
    layer, _ = layers(backend)
    weight = getattr(layer, name).detach()
    wrong = {"dtype": weight.double(), "size": weight[:-1], "device": weight.to("meta")}[change]
    setattr(layer, name, nn.Parameter(wrong))
    with pytest.raises((ValueError, RuntimeError)):
        layer(*arguments())


@each_backend
def test_autocast_takes_inputs_of_any_precision(backend):
    layer, _ = layers(backend)
    x, (h, c) = arguments()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            output, (_, c_n) = layer(x.to(dtype), (h.to(dtype), c))
            expected, _ = layer(x.to(dtype).float(), (h.to(dtype).float(), c))
        assert c_n.dtype == torch.float32
        torch.testing.assert_close(output.float(), expected.float(), rtol=1e-2, atol=1e-2)


@each_backend
def test_strides_offsets_and_negative_views_are_read_rightly(backend):
    layer, reference = layers(backend)
    x, (h, c) = arguments()
    negative = torch.complex(torch.zeros_like(c), -c).conj().imag
    assert negative.is_neg() and torch.equal(negative, c)
    spread = torch.zeros(6, 3, 11)[:, :, 1::2].copy_(x)
    wide = torch.zeros(4, 16)[1:].copy_(h)
    torch.testing.assert_close(
        layer(spread, (wide, negative)), reference(x, (h, c)), rtol=1e-5, atol=1e-6
    )
    same = h[:1].expand(3, 16)
    torch.testing.assert_close(layer(x, (same, same)), reference(x, (same, same)))


@each_backend
@pytest.mark.parametrize("hidden", [16, 20, 32])
def test_an_output_may_be_changed_in_place(hidden, backend):
    torch.manual_seed(0)
    layer = RecurrentLayer(CellSpec(input_size=5, hidden_size=hidden, rounds=2), backend)
    x, state = torch.randn(6, 3, 5, requires_grad=True), layer.zero_state(3)
    output, _ = layer(x, state)
    gradients = []
    for relu in (torch.relu, torch.relu_):
        loss = relu(layer(x, state)[0]).sum()
        gradients.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    torch.testing.assert_close(*gradients)
    assert output.min() < 0


def test_every_case_names_an_option():
    assert set(SOME) <= set(OPTIONS)
