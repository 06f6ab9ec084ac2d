"""The Triton kernels against the reference, in float32; `test_triton` runs this file.

In a process of its own, for Triton decides when it is imported whether it interprets
(TRITON_INTERPRET=1, on CPU tensors) or compiles. Short windows: the interpreter is slow.
"""

import math

import pytest
import torch
from torch import Tensor

from mogrifier_lm.cells import CellSpec
from mogrifier_lm.kernels.cross_entropy import BACKENDS
from mogrifier_lm.kernels.recurrence import resolve
from mogrifier_lm.kernels.recurrence.triton import wavefront
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import RegularizationConfig
from mogrifier_lm.regularization import draw_masks
from tests.kernels.test_recurrence import (
    EXACT,
    OPTIONS,
    Problem,
    assert_equal,
    error,
    problem,
)

SIZES = (2, 3, 13, 17)
ODD = [(1, 1, 50, 17), (1, 20, 17, 33), (2, 17, 16, 34), (2, 3, 32, 16)]


def filled(allocate):
    def with_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    return with_nan


@pytest.fixture
def nan_filled(monkeypatch):
    """Memory that is allocated and not written holds NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def assert_equals_reference(option: str, sizes: tuple[int, int, int, int]) -> None:
    exact = problem(option, sizes).run_backward("reference")
    for name, value in problem(option, sizes, torch.float32).run_backward("triton").items():
        assert value.dtype == torch.float32
        assert error(value, exact[name]) <= EXACT[torch.float32], name


def test_explicit_asking_gets_the_interpreter_and_auto_does_not():
    assert resolve("triton", "cpu") == "triton"
    assert resolve("auto", "cpu") != "triton"
    with pytest.raises(ValueError, match="triton.*float32.*float64"):
        resolve("triton", "cpu", dtype=torch.float64)


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_every_gradient_equal_the_references(option, nan_filled):
    assert_equals_reference(option, SIZES)


@pytest.mark.parametrize("sizes", ODD, ids=str)
@pytest.mark.parametrize("option", ["lstm capped", "low rank", "mogrifier rlstm"])
def test_odd_sizes(option, sizes, nan_filled):
    assert_equals_reference(option, sizes)


@pytest.mark.parametrize("option", ["lstm", "low rank", "mogrifier rlstm"])
def test_windows_carry_the_state_and_no_call_differs(option):
    case = problem(option, SIZES, torch.float32)
    whole = case.run_backward("triton")
    assert_equal(whole, case.run_backward("triton"))
    with torch.no_grad():
        values = dict(zip(("output", "h_n", "c_n"), case.run("triton"), strict=True))
    assert_equal(values, whole)
    outputs, h, c = [], case.h, case.c
    for t in range(SIZES[0]):
        mask = case.mask if case.mask is None or len(case.mask) == 1 else case.mask[t : t + 1]
        step = Problem(case.spec, case.x[t : t + 1], h, c, mask, case.parameters)
        output, h, c = step.run("triton")
        outputs.append(output)
    loss = sum(
        (out * d).sum() for out, d in zip((torch.cat(outputs), h, c), case.d_outputs, strict=True)
    )
    gradients = torch.autograd.grad(loss, list(case.inputs().values()))
    for (name, value), split in zip(
        whole.items(), (torch.cat(outputs), h, c, *gradients), strict=True
    ):
        assert error(split.detach(), value.double()) <= EXACT[torch.float32], name


@pytest.mark.parametrize("option", ["one round", "mogrifier rlstm"])
def test_streams_do_not_mix_and_nan_and_inf_do_not_come_out_finite(option):
    for value in (math.nan, math.inf):
        case = problem(option, SIZES, torch.float32)
        clean = case.run("triton")[0].detach().clone()
        with torch.no_grad():
            case.x[1, 1] = value
            output, h, c = case.run("triton")
        assert output[1:, 1].isnan().all() and h[1].isnan().all() and c[1].isnan().all()
        assert torch.equal(output[:1], clean[:1])
        assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])


@pytest.mark.parametrize("only", ["output", "h_n", "c_n"])
def test_one_output_alone_and_frozen_inputs(only):
    index = ("output", "h_n", "c_n").index(only)

    def gradients(backend: str) -> list[Tensor]:
        case = problem("low rank", SIZES, torch.float32)
        wanted = [case.x, case.parameters["weight_hh"]]
        for tensor in case.inputs().values():
            tensor.requires_grad_(any(tensor is w for w in wanted))
        return list(torch.autograd.grad(case.run(backend)[index].sum(), wanted))

    for value, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        assert error(value, expected.double()) <= EXACT[torch.float32]


def test_weights_changed_between_forward_and_backward_are_an_error():
    case = problem("mogrifier", SIZES, torch.float32)
    output, _, _ = case.run("triton")
    with torch.no_grad():
        case.parameters["weight_hh"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    "options, skip_sum", [({"rounds": 2, "rank": 3}, True), ({"rounds": 0}, False)]
)
def test_layers_as_a_wavefront_equal_one_after_the_other(options, skip_sum, monkeypatch):
    """Forward and every gradient, with dropout between the layers and on the states."""
    T, B, sizes = 3, 3, (13, 17, 17) if skip_sum else (13, 17, 9)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 2

    def kept(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) > 0.3) / 0.7

    specs = [
        CellSpec(input_size=a, hidden_size=b, **options)
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    x = normal(T, B, sizes[0])
    parameters = [{k: normal(*s) for k, s in spec.shapes().items()} for spec in specs]
    states = [(normal(B, n), normal(B, n)) for n in sizes[1:]]
    masks = [kept(1, B, n) for n in sizes[1:]]
    between = [kept(T, B, sizes[1])]
    inputs = [x, *(p for ps in parameters for p in ps.values()), *(s for hc in states for s in hc)]
    for tensor in inputs:
        tensor.requires_grad_()
    d_output = normal(T, B, sizes[-1])

    def results(run) -> list[Tensor]:
        outputs, last = run([s.weights(p) for s, p in zip(specs, parameters, strict=True)])
        output = sum(outputs) if skip_sum else outputs[-1]
        loss = (output * d_output).sum() + sum(h.sum() - c.sum() for h, c in last)
        return [output.detach(), *torch.autograd.grad(loss, inputs)]

    def side_by_side(weights):
        return wavefront.stack(x, states, weights, specs[0].options, masks, between)

    def one_after_the_other(weights):
        outputs, last, source = [], [], x
        for i, w in enumerate(weights):
            (output,), state = wavefront.stack(
                source, [states[i]], [w], specs[i].options, [masks[i]], []
            )
            outputs.append(output)
            last += state
            source = output if i else output * between[0]
        return outputs, last

    expected = results(one_after_the_other)
    for span in (1, 2):
        monkeypatch.setattr(wavefront, "SPAN", span)
        monkeypatch.setattr(wavefront, "SPAN_OF_ROUNDS", span)
        for value, e in zip(results(side_by_side), expected, strict=True):
            if options["rounds"]:
                assert torch.equal(value, e)
            else:  # the product of x for a span at a time
                torch.testing.assert_close(value, e, rtol=1e-5, atol=1e-6)


def test_the_loss_over_several_blocks_of_a_vocabulary():
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 4999, -100, 2048])
    bias = torch.zeros(5000)
    bias[:2048] = -math.inf  # a first block without a finite logit
    bias[0] = -30
    values = []
    for name in ("triton", "reference"):
        generator.manual_seed(0)
        hidden, weight = (
            torch.randn(n, 6, generator=generator).requires_grad_() for n in (4, 5000)
        )
        loss = BACKENDS[name].loss(hidden, weight, bias, targets, None, -100)
        values.append([loss.detach(), *torch.autograd.grad(loss, [hidden, weight])])
    torch.testing.assert_close(*values)


def test_waves_wait_for_the_layer_below_and_for_the_past():
    done: list[tuple[int, range]] = []
    spans = [range(0, 2), range(2, 4), range(4, 5)]
    wavefront.in_waves(lambda i, span: done.append((i, span)), range(3), spans, torch.device("cpu"))
    assert sorted(done, key=str) == sorted(((i, s) for i in range(3) for s in spans), key=str)
    for i, span in done:
        earlier = done[: done.index((i, span))]
        assert i == 0 or (i - 1, span) in earlier
        assert all((i, s) in earlier for s in spans if s.stop <= span.start)


@pytest.mark.parametrize("options", [{"skip_sum": True}, {"residual": True}, {}])
def test_a_language_model_has_the_fused_backends_loss_and_gradients(options):
    def values(backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        model = LanguageModel(11, 6, layer_specs([6, 6, 6], rounds=1), backend=backend, **options)
        tokens, targets = torch.randint(11, (2, 3, 2), generator=generator)
        shapes = model.mask_shapes
        rates = {f"{name}_dropout": 0.4 for name in ("input", "inter_layer", "state", "weight")}
        masks = draw_masks(RegularizationConfig(**rates), shapes, (3, 2), generator)
        loss, states = model.loss(tokens, targets, model.zero_states(2), masks)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [loss.detach(), *(s.detach() for state in states for s in state), *gradients]

    torch.testing.assert_close(values("triton"), values("fused"), rtol=1e-5, atol=1e-6)
