"""Each evaluator against its definition."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mogrifier_lm.evaluators.cache import Cache, cache_probabilities
from mogrifier_lm.evaluators.dynamic import Dynamic
from mogrifier_lm.evaluators.task import Evaluation, Task, Text, evaluate
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import RegularizationConfig
from mogrifier_lm.regularization import draw_masks, scaled
from tests.evaluators.test_contract import RATES, SETTINGS, V, make_model, make_split, nats


@pytest.mark.parametrize("rule, mean", [("rms", "elements"), ("rms", "tensors"), ("sgd", "")])
def test_dynamic_evaluation_is_its_equations(rule: str, mean: str) -> None:
    lr, decay, epsilon, window = 0.05, 0.3, 0.01, 5
    model, text, train = make_model(), make_split(2), make_split(1, 300)
    settings = {**SETTINGS["dynamic"], "window": window, "rule": rule, "mean": mean, "lr": lr,
                "decay": decay, "epsilon": epsilon, "statistics_tokens": 30,
                "statistics_batch_size": 1, "temperature": 1.0}  # fmt: skip
    task = Task(model, {"train": train, "test": text}, 0)
    (found,) = Dynamic().score(task, Text("test", text), [settings])

    def run(model: LanguageModel, ids: np.ndarray, update: Any) -> Tensor:
        tokens = torch.from_numpy(ids.astype(np.int64))[:, None]
        inputs = torch.cat([torch.zeros(1, 1, dtype=torch.int64), tokens[:-1]])
        states, total = model.zero_states(1), []
        for i in range(0, len(ids), window):
            hidden, states = model.encode(inputs[i : i + window], states)
            logits = hidden @ model.output_weight.T + model.output_bias
            losses = torch.nn.functional.cross_entropy(
                logits, tokens[i : i + window, 0], reduction="none"
            )
            total.append(losses.detach())
            update(torch.autograd.grad(losses.mean(), list(model.parameters())))
            states = [(h.detach(), c.detach()) for h, c in states]
        return torch.cat(total)

    gradients: list[tuple[Tensor, ...]] = []
    run(model, train.ids[:30], gradients.append)
    rms = [torch.stack(g).square().mean(0).sqrt() for g in zip(*gradients, strict=True)]
    if mean == "elements":
        average = torch.cat([r.flatten() for r in rms]).mean()
    else:
        average = torch.stack([r.mean() for r in rms]).mean()
    adapted, trained = make_model(), list(model.parameters())

    @torch.no_grad()
    def update(gradient: tuple[Tensor, ...]) -> None:
        for w, w0, g, r in zip(adapted.parameters(), trained, gradient, rms, strict=True):
            if rule == "rms":
                pull = (decay * r / average).clamp(max=1)
                w += -lr * g / (r + epsilon) + pull * (w0 - w)
            else:
                w += -lr * g + decay * (w0 - w)

    torch.testing.assert_close(found.nats, run(adapted, text.ids, update), rtol=1e-4, atol=1e-4)
    static = nats(model, "static", text, temperature=1.0)[""]
    assert (found.nats - static)[window:].abs().max() > 0.01, "nothing was learned"


def test_the_cache_is_its_equation() -> None:
    torch.manual_seed(0)
    hidden, targets = 3 * torch.randn(600, 5), torch.randint(V, (600,))  # more than a chunk
    windows, thetas = [1, 20, 450], [0.3, 1.0, 9.0]
    found = cache_probabilities(hidden, targets, windows, thetas)
    scores = hidden.double() @ hidden.double().T
    for w, window in enumerate(windows):
        for k, theta in enumerate(thetas):
            for t in (1, 2, 19, 21, 255, 256, 257, 599):
                past = slice(max(0, t - window), t)
                p = torch.softmax(theta * scores[t, past], 0)
                expected = p[targets[past] == targets[t]].sum().item()
                assert found[w, k, t].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_search_finds_the_best_of_all_combinations() -> None:
    text = make_split(2)
    config = Cache(weight=[0.0, 0.2, 0.5], theta=[0.1, 1.0], window=[3, 30])
    splits = {"valid": text, "test": make_split(3)}
    results, trials = evaluate("cache", config, Task(make_model(), splits, 0), ["valid", "test"])
    assert len(trials) == 12
    best = min(trials, key=lambda trial: trial["valid_nats"])
    entry = results["valid"].to_dict()
    assert entry["nats"] / len(text.ids) == pytest.approx(best["valid_nats"])
    chosen = {k: best[k] for k in ("weight", "theta", "window")}
    assert results["test"].settings == results["valid"].settings == chosen


class Diverging:
    """Better with a larger gain, which lasts for so many tokens."""

    needs = ()

    def __init__(self) -> None:
        self.gain, self.tune_tokens = [0.5, 3.0, 2.0, 1.0], 20

    def score(self, task: Task, text: Text, settings: list[dict[str, Any]]) -> Any:
        for s in settings:
            nats = torch.full((len(text),), 5 - s["gain"])
            nats[int(60 / s["gain"]) :] = torch.inf
            yield Evaluation(nats)


def test_settings_that_do_not_last_give_way_to_the_next_best(caplog) -> None:
    splits = {"valid": make_split(2, 55), "test": make_split(3, 65)}
    task = Task(make_model(), splits, 0)
    results, trials = evaluate("diverging", Diverging(), task, ["valid", "test"])
    assert len(trials) == 4 and results["valid"].settings["gain"] == 1.0
    assert results["valid"].score.nats == pytest.approx(4 * 55)
    # The test text has no say.
    assert results["test"].settings["gain"] == 1.0 and results["test"].score.nats == math.inf
    assert caplog.text.count("the next best are taken") == 2


@pytest.mark.parametrize("mixture", [1, 2])
def test_mc_dropout_is_the_mean_over_passes(mixture: int) -> None:
    """Masks are drawn per window for all passes; each pass carries its own state."""
    model, text, passes, window = make_model(mixture), make_split(2), 3, 6
    found = nats(model, "mc_dropout", text, passes=passes, window=window, scale=0.5)
    tokens = torch.from_numpy(text.ids.astype(np.int64))[:, None].expand(-1, passes)
    inputs = torch.cat([torch.zeros(1, passes, dtype=torch.int64), tokens[:-1]])
    generator, states, log_p = torch.Generator().manual_seed(0), model.zero_states(passes), []
    with torch.no_grad():
        for i in range(0, len(tokens), window):
            x = inputs[i : i + window]
            masks = draw_masks(scaled(RATES, 0.5), model.mask_shapes, (len(x), passes), generator)
            hidden, states = model.encode(x, states, masks)
            log_p.append(model.log_probs(hidden, 0.9).view(len(x), passes, V))
    log_p_TBV, targets_T1 = torch.cat(log_p).double(), tokens[:, :1]
    arithmetic = log_p_TBV.exp().mean(1).log().gather(1, targets_T1)
    geometric = log_p_TBV.mean(1).log_softmax(1).gather(1, targets_T1)
    torch.testing.assert_close(found[""], -arithmetic.squeeze(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found["geometric"].double(), -geometric.squeeze(1), rtol=1e-4, atol=1e-4
    )
    single = [nats(model, "mc_dropout", text, passes=1, seed=s)[""].sum() for s in range(8)]
    many = nats(model, "mc_dropout", text, passes=64)[""].sum()
    assert many < torch.stack(single).mean(), "the mean of passes is better than a pass"


def test_rounds_that_are_cut_are_a_model_with_fewer() -> None:
    from mogrifier_lm.options import ModelConfig
    from mogrifier_lm.runs.build import build_model

    model, text = make_model(), make_split(2)
    found = nats(model, "rounds", text, RegularizationConfig())
    assert sorted(found) == ["", "rounds_0", "rounds_1", "rounds_2"]
    for r in range(3):
        shorter = build_model(ModelConfig(hidden_size=8, rounds=r), V)
        shorter.load_state_dict(model.state_dict(), strict=False)
        expected = nats(shorter, "static", text, temperature=1.0)[""]
        torch.testing.assert_close(found[f"rounds_{r}"].double(), expected)
    assert torch.equal(found[""].float(), found["rounds_2"].float())
