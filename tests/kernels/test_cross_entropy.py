"""The chunked output loss against torch's own, which keeps all logits.

Row counts of 300 and more span several blocks and chunks of every dtype, the last one not full.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from mogrifier_lm.kernels import cross_entropy as kernel
from mogrifier_lm.kernels.cross_entropy import linear_cross_entropy, token_nats

V, E = 37, 12


@pytest.fixture(autouse=True, params=["native", "portable"])
def softmax(request, monkeypatch):
    """Every test holds for the passes in C++ and in plain torch operations."""
    if request.param == "portable":
        monkeypatch.setattr(kernel, "_library", lambda: None)
    elif kernel._library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def problem(n: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Tensor | None]:
    """hidden, weight, bias, targets; the largest logits are about 10."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, E, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(V, (n,), generator=generator)
    floats = [None if p is None else p.to(dtype).requires_grad_() for p in (hidden, weight, bias_V)]
    return [*floats, targets]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")


def loss_and_gradients(loss_function, arguments) -> list[Tensor]:
    loss = loss_function(*arguments)
    wanted = [a for a in arguments[:3] if a is not None]
    return [loss.detach(), *torch.autograd.grad(loss / 3, wanted)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 23, 256, 301, 1100])
def test_loss_and_gradients_equal_cross_entropy_on_full_logits(n, bias):
    arguments = problem(n, bias=bias)
    expected = loss_and_gradients(plain, arguments)
    torch.testing.assert_close(loss_and_gradients(linear_cross_entropy, arguments), expected)


def test_an_ignored_row_scores_zero_and_has_no_gradient():
    *floats, targets = problem(301)
    ignored = [0, 4, 255, 256, 300]
    targets[ignored] = -100
    arguments = [*floats, targets]
    ours = loss_and_gradients(linear_cross_entropy, arguments)
    torch.testing.assert_close(ours, loss_and_gradients(plain, arguments))
    assert (ours[1][ignored] == 0).all()
    assert (token_nats(*arguments)[ignored] == 0).all()


def test_gradients_pass_gradcheck():
    *floats, targets = problem(5)
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda *floats: linear_cross_entropy(*floats, targets), floats)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_a_gradient_that_is_not_needed_is_not_given(wanted):
    arguments = problem(7)
    expected = loss_and_gradients(plain, arguments)[1:]
    for argument, needed in zip(arguments[:3], wanted, strict=True):
        argument.requires_grad_(needed)
    (linear_cross_entropy(*arguments) / 3).backward()
    for argument, needed, gradient in zip(arguments[:3], wanted, expected, strict=True):
        assert (argument.grad is not None) == needed
        if needed:
            torch.testing.assert_close(argument.grad, gradient)


def test_backward_may_run_twice():
    arguments = problem(7)
    loss = linear_cross_entropy(*arguments)
    first = torch.autograd.grad(loss, arguments[:3], retain_graph=True)
    second = torch.autograd.grad(2 * loss, arguments[:3])
    torch.testing.assert_close([2 * g for g in first], list(second))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_low_precision_error_is_at_most_twice_the_plain_ways(precision):
    exact = loss_and_gradients(plain, problem(1100))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        arguments = problem(1100, torch.float32)
        ours = loss_and_gradients(linear_cross_entropy, arguments)
        theirs = loss_and_gradients(plain, arguments)
    for name, a, b, e in zip(
        ("loss", "hidden", "weight", "bias"), ours, theirs, exact, strict=True
    ):
        assert a.dtype == torch.float32
        tiny = 1e-6 * e.abs().max()
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + tiny, name


def test_weight_gradients_add_up_in_float32_over_many_bf16_chunks(monkeypatch):
    exact = loss_and_gradients(plain, problem(1100))
    monkeypatch.setattr(kernel, "_chunk_rows", lambda device, dtype: 16)
    with torch.autocast("cpu", torch.bfloat16):
        *_, ours, _ = loss_and_gradients(linear_cross_entropy, problem(1100, torch.float32))
        *_, theirs, _ = loss_and_gradients(plain, problem(1100, torch.float32))
    assert (ours - exact[2]).norm() <= 2 * (theirs - exact[2]).norm()


def test_autocast_rounds_the_products_alone_and_spares_float64():
    """Logits that bf16 holds exactly give float32's nats; other logits are rounded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, V, generator=generator)
    targets = torch.randint(V, (V,), generator=generator)
    eye = torch.eye(V)
    rounded = weight.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        nats, double = (
            token_nats(e, w, None, targets)
            for e, w in ((eye, weight), (eye.double(), weight.double()))
        )
    torch.testing.assert_close(nats, cross_entropy(rounded.T, targets, reduction="none"))
    torch.testing.assert_close(double, cross_entropy(weight.T, targets, reduction="none"))


def test_token_nats_sum_to_the_loss_and_equal_cross_entropy_by_row():
    arguments = problem(301)
    nats = token_nats(*arguments)
    assert not nats.requires_grad
    nats = nats.double()
    by_row = cross_entropy(linear(*arguments[:3]), arguments[3], reduction="none").detach()
    torch.testing.assert_close(nats, by_row, rtol=1e-6, atol=1e-6)
    loss = linear_cross_entropy(*arguments).detach()
    torch.testing.assert_close(nats.sum(), loss, rtol=1e-6, atol=0)


def test_no_grad_gives_the_same_loss_without_a_graph():
    arguments = problem(301)
    with torch.no_grad():
        loss = linear_cross_entropy(*arguments)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(*arguments).detach())


def test_a_uniform_model_scores_n_ln_v():
    hidden, targets = torch.randn(50, E), torch.randint(V, (50,))
    nats = linear_cross_entropy(hidden, torch.zeros(V, E), None, targets)
    assert nats.item() == pytest.approx(50 * math.log(V), rel=1e-6)


def test_nats_of_a_certain_and_of_an_impossible_word_are_exact():
    logits = torch.tensor([[0.0, 200.0], [0.0, 200.0]])
    nats = token_nats(logits, torch.eye(2), None, torch.tensor([1, 0]))
    assert nats.tolist() == [0, 200]


def test_no_rows_score_zero():
    *floats, targets = problem(0)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, [*floats, targets])
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_nan_and_inf_do_not_come_out_finite():
    for value in (math.nan, math.inf):
        hidden, weight, bias, targets = problem(6, torch.float32)
        with torch.no_grad():
            hidden[3, 2] = value
        loss = linear_cross_entropy(hidden, weight, bias, targets)
        assert not loss.isfinite()


def plain_mixture(hidden, weight, bias, targets, log_prior):
    components = linear(hidden, weight, bias).log_softmax(1).view(*log_prior.shape, -1)
    log_p = (components + log_prior.unsqueeze(2)).logsumexp(1)
    return torch.nn.functional.nll_loss(log_p, targets, reduction="sum")


@pytest.mark.parametrize(("n", "components"), [(1, 2), (23, 3), (301, 7), (1100, 1)])
def test_a_mixture_equals_the_log_of_the_mixed_probabilities(n, components):
    hidden, weight, bias, _ = problem(n * components)
    targets = torch.arange(n) % V
    targets[n // 2] = -100
    prior = torch.randn(n, components, dtype=torch.float64).log_softmax(1).requires_grad_()
    wanted = [hidden, weight, bias, prior]
    results = []
    for function in (linear_cross_entropy, plain_mixture):
        loss = function(hidden, weight, bias, targets, prior)
        results.append([loss.detach(), *torch.autograd.grad(loss / 3, wanted)])
    torch.testing.assert_close(*results)
    nats = token_nats(hidden, weight, bias, targets, prior)
    assert nats.shape == (n,) and nats[n // 2] == 0
    assert nats.sum().item() == pytest.approx(results[0][0].item(), rel=1e-6)


def test_a_target_outside_the_vocabulary_is_an_error():
    *floats, targets = problem(5)
    targets[1] = V
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(*floats, targets)


WIKITEXT2_STEP = """
import sys, torch
from torch.nn.functional import cross_entropy, linear
from mogrifier_lm.kernels import cross_entropy as kernel
from mogrifier_lm.kernels.cross_entropy import linear_cross_entropy
N, V, E = 70 * 64, 33278, 400
if sys.argv[1] == "portable":
    kernel._library = lambda: None
hidden, weight = torch.randn(N, E), torch.randn(V, E) / E**0.5  # larger: slow subnormal gradients
hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
targets = torch.randint(V, (N,))
def peak():  # not getrusage's: that of a new process begins at its parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
if sys.argv[1] == "plain":
    loss = cross_entropy(linear(hidden, weight), targets, reduction="sum")
else:
    loss = linear_cross_entropy(hidden, weight, None, targets)
loss.backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_of_a_wikitext2_step_is_a_third_of_the_plain_ways(softmax):
    peak = {
        way: int(subprocess.check_output([sys.executable, "-c", WIKITEXT2_STEP, way]))
        for way in ("plain", softmax)
    }
    assert 0 < 3 * peak[softmax] <= peak["plain"], peak


SCORING = """
import torch
from pathlib import Path
from mogrifier_lm.model import LanguageModel, layer_specs

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
model = LanguageModel(33278, 200, layer_specs([200, 200, 200], rounds=4))
tokens, states, kept, sizes = torch.randint(33278, (512, 1)), model.zero_states(1), [], []
for _ in range(14):
    with torch.no_grad():
        hidden, states = model.encode(tokens, states)
        for temperature in (0.9, 0.95, 1.0):
            kept.append(model.output_nats(hidden, tokens.flatten(), temperature))
    sizes.append(resident())
print(sizes[-1] - sizes[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_scoring_does_not_grow() -> None:
    done = subprocess.run([sys.executable, "-c", SCORING], capture_output=True, text=True)
    assert float(done.stdout) < 40, done.stderr  # MB in ten windows; it was 79 in each
