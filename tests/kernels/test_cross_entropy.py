"""The output loss of every backend against torch's own, which keeps all logits.

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

from mogrifier_lm.kernels.cross_entropy import BACKENDS, chunked, native, resolve

V, E, IGNORE = 37, 12, -100


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request) -> str:
    """Every test holds for every backend that can run here."""
    try:
        return resolve(request.param, "cpu")
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def exact(backend) -> torch.dtype:
    """The widest dtype that the backend has."""
    return torch.float32 if backend in ("native", "triton") else torch.float64


@pytest.fixture
def linear_cross_entropy(backend):
    """The backend's loss, with the arguments that may be left out here."""

    def loss(hidden, weight, bias, targets, log_prior=None, ignore_index=IGNORE):
        return BACKENDS[backend].loss(hidden, weight, bias, targets, log_prior, ignore_index)

    return loss


@pytest.fixture
def token_nats(backend):
    def nats(hidden, weight, bias, targets, log_prior=None, ignore_index=IGNORE):
        return BACKENDS[backend].token_nats(hidden, weight, bias, targets, log_prior, ignore_index)

    return nats


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


def close(values, expected) -> None:
    """To what was computed in float64, each in its own dtype."""
    values, expected = ([tensor.detach() for tensor in tensors] for tensors in (values, expected))
    torch.testing.assert_close(values, [e.to(v) for v, e in zip(values, expected, strict=True)])


def loss_and_gradients(loss_function, arguments) -> list[Tensor]:
    loss = loss_function(*arguments)
    wanted = [a for a in arguments[:3] if a is not None]
    return [loss.detach(), *torch.autograd.grad(loss / 3, wanted)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 23, 256, 301, 1100])
def test_loss_and_gradients_equal_cross_entropy_on_full_logits(
    n, bias, exact, linear_cross_entropy
):
    expected = loss_and_gradients(plain, problem(n, bias=bias))
    close(loss_and_gradients(linear_cross_entropy, problem(n, exact, bias)), expected)


@pytest.mark.parametrize("index", [IGNORE, -1])
def test_an_ignored_row_scores_zero_and_has_no_gradient(
    index, exact, linear_cross_entropy, token_nats
):
    *floats, targets = problem(301, exact)
    ignored = [0, 4, 255, 256, 300]
    targets[ignored] = index
    ours = loss_and_gradients(linear_cross_entropy, [*floats, targets, None, index])
    close(ours, loss_and_gradients(plain, [*problem(301)[:3], targets.where(targets >= 0, IGNORE)]))
    assert (ours[1][ignored] == 0).all()
    assert (token_nats(*floats, targets, None, index)[ignored] == 0).all()


def test_gradients_pass_gradcheck(exact, linear_cross_entropy):
    if exact != torch.float64:
        pytest.skip("differences need float64")
    *floats, targets = problem(5)
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda *floats: linear_cross_entropy(*floats, targets), floats)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_a_gradient_that_is_not_needed_is_not_given(wanted, exact, linear_cross_entropy):
    arguments = problem(7, exact)
    expected = loss_and_gradients(plain, problem(7))[1:]
    for argument, needed in zip(arguments[:3], wanted, strict=True):
        argument.requires_grad_(needed)
    (linear_cross_entropy(*arguments) / 3).backward()
    for argument, needed, gradient in zip(arguments[:3], wanted, expected, strict=True):
        assert (argument.grad is not None) == needed
        if needed:
            close([argument.grad], [gradient])


def test_backward_may_run_twice(exact, linear_cross_entropy):
    arguments = problem(7, exact)
    loss = linear_cross_entropy(*arguments)
    first = torch.autograd.grad(loss, arguments[:3], retain_graph=True)
    second = torch.autograd.grad(2 * loss, arguments[:3])
    torch.testing.assert_close([2 * g for g in first], list(second))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_low_precision_error_is_at_most_twice_the_plain_ways(precision, linear_cross_entropy):
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


def test_weight_gradients_add_up_in_float32_over_many_bf16_chunks(
    backend, monkeypatch, linear_cross_entropy
):
    if backend == "reference":
        pytest.skip("has no chunks")
    exact = loss_and_gradients(plain, problem(1100))
    monkeypatch.setattr(chunked, "_chunk_rows", lambda device, dtype, classes: 16)
    with torch.autocast("cpu", torch.bfloat16):
        *_, ours, _ = loss_and_gradients(linear_cross_entropy, problem(1100, torch.float32))
        *_, theirs, _ = loss_and_gradients(plain, problem(1100, torch.float32))
    assert (ours - exact[2]).norm() <= 2 * (theirs - exact[2]).norm()


def test_autocast_rounds_the_products_alone_and_spares_float64(exact, token_nats):
    """Logits that bf16 holds exactly give float32's nats; other logits are rounded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, V, generator=generator)
    targets = torch.randint(V, (V,), generator=generator)
    eye = torch.eye(V)
    rounded = weight.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        nats = token_nats(eye, weight, None, targets)
        spared = (
            token_nats(eye.double(), weight.double(), None, targets) if exact.itemsize > 4 else None
        )
    torch.testing.assert_close(nats, cross_entropy(rounded.T, targets, reduction="none"))
    if spared is not None:
        torch.testing.assert_close(spared, cross_entropy(weight.T, targets, reduction="none"))


def test_token_nats_sum_to_the_loss_and_equal_cross_entropy_by_row(
    exact, linear_cross_entropy, token_nats
):
    arguments = problem(301, exact)
    nats = token_nats(*arguments)
    assert not nats.requires_grad
    nats = nats.double()
    logits, targets = linear(*problem(301)[:3]), arguments[3]
    by_row = cross_entropy(logits, targets, reduction="none").detach()
    torch.testing.assert_close(nats, by_row, rtol=1e-5, atol=1e-5)
    loss = linear_cross_entropy(*arguments).detach()
    torch.testing.assert_close(nats.sum(), loss.double(), rtol=1e-6, atol=0)


def test_no_grad_gives_the_same_loss_without_a_graph(exact, linear_cross_entropy):
    arguments = problem(301, exact)
    with torch.no_grad():
        loss = linear_cross_entropy(*arguments)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(*arguments).detach())


def test_a_uniform_model_scores_n_ln_v(linear_cross_entropy):
    hidden, targets = torch.randn(50, E), torch.randint(V, (50,))
    nats = linear_cross_entropy(hidden, torch.zeros(V, E), None, targets)
    assert nats.item() == pytest.approx(50 * math.log(V), rel=1e-6)


def test_nats_of_a_certain_and_of_an_impossible_word_are_exact(token_nats):
    logits = torch.tensor([[0.0, 200.0], [0.0, 200.0]])
    nats = token_nats(logits, torch.eye(2), None, torch.tensor([1, 0]))
    assert nats.tolist() == [0, 200]


def test_no_rows_score_zero(exact, linear_cross_entropy):
    *floats, targets = problem(0, exact)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, [*floats, targets])
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_nan_and_inf_do_not_come_out_finite(linear_cross_entropy):
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
def test_a_mixture_equals_the_log_of_the_mixed_probabilities(
    n, components, exact, linear_cross_entropy, token_nats
):
    targets = torch.arange(n) % V
    targets[n // 2] = -100
    results = []
    for function, dtype in ((plain_mixture, torch.float64), (linear_cross_entropy, exact)):
        hidden, weight, bias, _ = problem(n * components, dtype)
        logits = torch.randn(n, components, generator=torch.Generator().manual_seed(1))
        prior = logits.to(dtype).log_softmax(1).requires_grad_()
        loss = function(hidden, weight, bias, targets, prior)
        gradients = torch.autograd.grad(loss / 3, [hidden, weight, bias, prior])
        results.append([loss.detach(), *gradients])
    close(results[1], results[0])
    nats = token_nats(hidden, weight, bias, targets, prior)
    assert nats.shape == (n,) and nats[n // 2] == 0
    assert nats.sum().item() == pytest.approx(results[0][0].item(), rel=1e-5)


@pytest.mark.parametrize("target", [V, -1, 2**40])
def test_a_target_outside_the_vocabulary_is_an_error(
    target, exact, linear_cross_entropy, token_nats
):
    *floats, targets = problem(5, exact)
    targets[1] = target
    for function in (linear_cross_entropy, token_nats):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            function(*floats, targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32, torch.bool])
def test_targets_of_another_dtype_are_an_error(dtype, exact, linear_cross_entropy, token_nats):
    *floats, targets = problem(5, exact)
    for function in (linear_cross_entropy, token_nats):
        with pytest.raises((TypeError, RuntimeError), match="int64|Long|nll_loss"):
            function(*floats, targets.to(dtype))


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_targets_of_another_number_are_an_error(rows, exact, linear_cross_entropy):
    *floats, _ = problem(5, exact)
    with pytest.raises((ValueError, RuntimeError)):
        linear_cross_entropy(*floats, torch.zeros(rows, dtype=torch.int64))


def test_targets_and_hidden_need_not_be_contiguous(exact, linear_cross_entropy):
    hidden, weight, bias, targets = problem(23, exact)
    expected = loss_and_gradients(linear_cross_entropy, [hidden, weight, bias, targets])
    spread = [p.detach().t().contiguous().t().requires_grad_() for p in (hidden, weight)]
    others = targets.repeat_interleave(2)[::2]
    close(loss_and_gradients(linear_cross_entropy, [*spread, bias, others]), expected)


def test_the_native_backend_refuses_what_it_has_not(monkeypatch):
    with pytest.raises(ValueError, match="native.*float64"):
        resolve("native", "cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match="native.*cuda"):
        resolve("native", "cuda")
    with pytest.raises(ValueError, match="native.*float64"):
        BACKENDS["native"].loss(*problem(5), None, IGNORE)
    assert resolve("auto", "cpu", dtype=torch.float64) == "chunked"
    with pytest.raises(ValueError, match="backend is 'fast', it must be one of auto, reference"):
        resolve("fast", "cpu")

    def library():
        raise OSError("no compiler here")

    monkeypatch.setattr(native, "library", library)
    assert resolve("auto", "cpu") == "chunked"
    with pytest.raises(ValueError, match="backend is native: no compiler here"):
        resolve("native", "cpu")


def test_float16_autocast_runs(linear_cross_entropy):
    expected = loss_and_gradients(plain, problem(23))
    with torch.autocast("cpu", torch.float16):
        values = loss_and_gradients(linear_cross_entropy, problem(23, torch.float32))
    for value, e in zip(values, expected, strict=True):
        assert (value - e).abs().max() <= 2e-2 * e.abs().max()


WIKITEXT2_STEP = """
import sys, torch
from torch.nn.functional import cross_entropy, linear
from mogrifier_lm.kernels.cross_entropy import BACKENDS
N, V, E = 70 * 64, 33278, 400
hidden, weight = torch.randn(N, E), torch.randn(V, E) / E**0.5  # larger: slow subnormal gradients
hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
targets = torch.randint(V, (N,))
def peak():  # not getrusage's: that of a new process begins at its parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
if sys.argv[1] == "plain":
    loss = cross_entropy(linear(hidden, weight), targets, reduction="sum")
else:
    loss = BACKENDS[sys.argv[1]].loss(hidden, weight, None, targets, None, -100)
loss.backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_of_a_wikitext2_step_is_a_third_of_the_plain_ways(backend):
    if backend == "reference":
        pytest.skip("is the plain way")
    peak = {
        way: int(subprocess.check_output([sys.executable, "-c", WIKITEXT2_STEP, way]))
        for way in ("plain", backend)
    }
    assert 0 < 3 * peak[backend] <= peak["plain"], peak


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
