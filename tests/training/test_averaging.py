"""Each averaging rule against its definition on recorded weights."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mogrifier_lm.training.averaging import RULES, Averaging, swapped

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EVERY = 20  # steps between validations
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "nt_asgd": {"nonmono": 2},
    "tail": {"patience": 2},
    "ema": {"decay": 0.9},
    "two_tailed": {"patience": 3},
}


CURVATURE = torch.logspace(-2, 0, 200, dtype=torch.float64)


def train(steps: int, overfit: bool = False, seed: int = 0) -> Tensor:
    """Every weight vector of SGD on a noisy quadratic; `overfit` moves its minimum, not `loss`'s,
    halfway."""
    generator = torch.Generator().manual_seed(seed)
    weights, recorded = torch.full_like(CURVATURE, 5.0), []
    for step in range(steps):
        gradient = CURVATURE * (weights - 4.0 * (overfit and step >= steps // 2))
        gradient += 0.3 * torch.randn(200, dtype=torch.float64, generator=generator)
        weights = weights - 0.2 * gradient
        recorded.append(weights)
    return torch.stack(recorded)


def loss(weights: Tensor, step: int = 0) -> float:
    return float(CURVATURE @ weights.detach().double() ** 2)


def replay(
    averaging: Averaging,
    recorded: Tensor,
    f: Callable[[Tensor, int], float],
    first: int = 1,
) -> Iterator[tuple[int, str, list[Tensor]]]:
    """Train over recorded weights (from step `first`); yields each validation's outcome."""
    for step in range(first, len(recorded) + 1):
        for parameter, value in zip(
            averaging.parameters, recorded[step - 1].split(80), strict=True
        ):
            parameter.detach().copy_(value)
        averaging.update()
        if step % EVERY == 0:
            candidates = averaging.candidates()
            assert next(iter(candidates)) == "raw"
            ppl = {name: f(torch.cat(weights), step) for name, weights in candidates.items()}
            used = averaging.after_validation(ppl, step)
            yield step, used, candidates[used]


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Averaging:
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (80, 80, 40)]
    return RULES[name](parameters, **options)


def algorithm_2(recorded: Tensor, patience: int) -> Iterator[int]:
    """Two-Tailed Averaging by its paper, means taken afresh; yields the length it reports."""
    short = long = 0
    losses: dict[str, list[float]] = {"S": [], "L": []}
    for step in range(1, len(recorded) + 1):
        short, long = short + 1, long + 1
        if step % EVERY:
            continue
        f_1, f_s, f_l = (loss(recorded[step - n : step].mean(0)) for n in (1, short, long))
        losses = {"S": [*losses["S"], f_s], "L": [*losses["L"], f_l]}
        stagnant = {
            k: len(v) > patience and min(v[-patience:]) >= min(v[:-patience])
            for k, v in losses.items()
        }
        if f_s <= f_l or stagnant["L"]:
            f_l, long, short = f_s, short, 0
            losses = {"L": losses["S"], "S": []}
        elif stagnant["S"]:
            short, losses["S"] = 0, []
        if long > 1 and f_1 <= f_l:
            if long == EVERY:
                short = long = 0
                losses = {"S": [], "L": []}
            yield 1
        else:
            yield long


@pytest.mark.parametrize(
    ("losses", "starts"),
    [
        ([100, 90, 80, 81, 82, 83, 84, 85, 86, 87], 9),  # the best leaves the masked last five
        ([100, 90, 80, 81, 82, 83, 84, 85, 80, 80], None),  # equal is not worse
        ([100, 101, 102, 103, 104, 105, 106], 7),  # as early as can be: after six others
        ([100, 101, 102, 103, 104, 105], None),
        ([100, 90, 80, 70, 60, 50, 89, 50], None),  # the paper's misprint starts at this setback
        ([math.inf, 101, 102, 103, 104, 105, math.inf, 102], 8),
    ],
)
def test_nt_asgd_starts_where_the_published_code_does(
    losses: list[float], starts: int | None
) -> None:
    averaging, recorded = build("nt_asgd", nonmono=5), train(len(losses) * EVERY)
    started = None
    for step, used, weights in replay(averaging, recorded, lambda w, t: losses[t // EVERY - 1]):
        if averaging.started and started is None:  # type: ignore[attr-defined]
            started = step
            assert used == "raw"
        elif started is not None:
            assert used == "average"
            expected = recorded[started:step].mean(0)
            torch.testing.assert_close(torch.cat(weights), expected, rtol=1e-12, atol=1e-12)
    assert started == (None if starts is None else starts * EVERY)


@pytest.mark.parametrize(
    ("options", "losses", "starts"),
    [
        ({"patience": 3}, [9, 8, 8, 7, 7.5, 7, 7, 6], 7),
        ({"patience": 3}, [9, 8, 8.5, 8.5, 7, 7.5, 7.5], None),
        ({"patience": 3, "start_step": 3 * EVERY - 5}, [9, 8, 7, 6, 5], 3),
        ({"patience": 99, "start_step": 3 * EVERY}, [9, 9, 9, 9, 9], 3),
        ({"patience": 99, "start_step": 0}, [9, 9], 0),
    ],
)
def test_tail_starts_when_validation_stalls_or_at_its_step(
    options: dict[str, Any], losses: list[float], starts: int | None
) -> None:
    averaging, recorded = build("tail", **options), train(len(losses) * EVERY)
    for step, used, weights in replay(averaging, recorded, lambda w, t: losses[t // EVERY - 1]):
        if starts is None or step <= starts * EVERY:
            assert used == "raw" and torch.equal(torch.cat(weights), recorded[step - 1])
        else:
            expected = recorded[starts * EVERY : step].mean(0)
            assert used == "average"
            torch.testing.assert_close(torch.cat(weights), expected, rtol=1e-12, atol=1e-12)


def test_exponential_average_is_the_weighted_sum() -> None:
    averaging, recorded = build("ema", decay=0.97), train(5 * EVERY)
    for step, used, weights in replay(averaging, recorded, loss):
        factors = 0.97 ** torch.arange(step - 1, -1, -1, dtype=torch.float64)
        expected = factors @ recorded[:step] / factors.sum()
        assert used == "average"
        torch.testing.assert_close(torch.cat(weights), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("overfit", [False, True])
def test_two_tailed_averaging_is_algorithm_2(seed: int, overfit: bool) -> None:
    """Its lengths, with resets by stagnation where the loss turns up; means of just those steps."""
    recorded = train(100 * EVERY, overfit, seed=seed)

    averaging, lengths = build("two_tailed", patience=3), []
    for step, used, weights in replay(averaging, recorded, loss):
        lengths.append(1 if used == "raw" else int(averaging.means["long"].length))
        expected = recorded[step - lengths[-1] : step].mean(0)
        torch.testing.assert_close(torch.cat(weights), expected, rtol=1e-12, atol=1e-12)
    assert lengths == list(algorithm_2(recorded, patience=3))
    without_resets = list(algorithm_2(recorded, patience=10**9))
    assert lengths[0] == 1 and (lengths != without_resets) == overfit


@pytest.mark.parametrize("seed", range(2))
def test_two_tailed_averaging_is_near_the_best_tail(seed: int) -> None:
    """Against the best of all tails that start at a validation, found by trying each."""
    recorded, ratios = train(100 * EVERY, seed=seed), []
    for step, _, weights in replay(build("two_tailed", patience=3), recorded, loss):
        tails = range(EVERY, step + 1, EVERY)
        best = min(loss(recorded[step - n : step].mean(0)) for n in tails)
        ratios.append(loss(torch.cat(weights)) / best)
    assert max(ratios[10:]) < 1.1


@pytest.mark.parametrize("name", RULES)
def test_a_state_loaded_at_any_step_goes_on_to_the_same_bits(name: str) -> None:
    recorded = train(60 * EVERY)[-12 * EVERY :].float()  # where validation no longer improves

    def f(weights: Tensor, step: int) -> float:
        return loss(weights) if step > EVERY else math.inf

    def outcomes(averaging: Averaging, first: int) -> list[tuple[int, str, list[float]]]:
        found = replay(averaging, recorded, f, first)
        return [(step, used, torch.cat(weights).tolist()) for step, used, weights in found]

    whole = outcomes(build(name, torch.float32, **OPTIONS[name]), 1)
    assert name == "none" or whole[-1][1] != "raw"
    for stop in range(0, len(recorded), 7):
        for cut in {stop, stop // EVERY * EVERY}:  # also right after a validation
            before, after = (build(name, torch.float32, **OPTIONS[name]) for _ in range(2))
            list(replay(before, recorded[:cut], f))
            tensors, values = before.state_dict()
            stored = {k: v.clone() for k, v in tensors.items()}
            after.load_state_dict(stored, json.loads(json.dumps(values, allow_nan=False)))
            assert outcomes(after, cut + 1) == [o for o in whole if o[0] > cut]


def test_a_state_of_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="not a state of Exponential"):
        build("ema", decay=0.999).load_state_dict(*build("tail", patience=2).state_dict())


def test_swapped_restores_the_raw_weights_bit_for_bit() -> None:
    averaging = build("ema", torch.bfloat16, decay=0.999)
    raw, addresses = train(3)[-1].bfloat16(), [p.data_ptr() for p in averaging.parameters]
    list(replay(averaging, train(2), lambda w, t: 1.0))
    list(replay(averaging, raw[None], lambda w, t: 1.0))
    average = averaging.candidates()["average"]
    assert average[0].dtype == torch.float32  # bf16 would swallow small changes
    versions = [p._version for p in averaging.parameters]
    with pytest.raises(KeyError), swapped(averaging, average):
        for parameter, mean in zip(averaging.parameters, average, strict=True):
            assert torch.equal(parameter, mean.bfloat16()) and parameter.requires_grad
        assert not torch.equal(torch.cat(averaging.parameters), raw)
        assert all(p._version > v for p, v in zip(averaging.parameters, versions, strict=True))
        raise KeyError
    assert torch.equal(torch.cat(averaging.parameters), raw)
    assert [p.data_ptr() for p in averaging.parameters] == addresses
    with swapped(averaging, averaging.candidates()["raw"]):
        assert torch.equal(torch.cat(averaging.parameters), raw)


@pytest.mark.gpu
@needs_gpu
def test_updates_captured_before_the_start_average_from_it() -> None:
    weights = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    averaging, graph = RULES["tail"]([weights], patience=1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights.detach().add_(1)
        averaging.update()
    for step in range(1, 7):
        graph.replay()
        if step == 2:
            assert [averaging.after_validation({"raw": 1.0}, step) for _ in "12"] == ["raw", "raw"]
    assert averaging.candidates()["average"][0].tolist() == [4.5] * 3
