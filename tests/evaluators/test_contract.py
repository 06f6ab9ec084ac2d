"""What holds for every evaluator: it predicts, from the past alone, a distribution."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from mogrifier_lm.config import validate
from mogrifier_lm.data import Split
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import EvaluatorsConfig
from mogrifier_lm.evaluators.task import Evaluator, Task, Text, check_causality, evaluate
from mogrifier_lm.launch.explain import schema_of
from mogrifier_lm.model import LanguageModel, States, restored
from mogrifier_lm.options import ModelConfig, RegularizationConfig
from mogrifier_lm.regularization import Masks
from mogrifier_lm.runs.build import build_model

V, N = 7, 40
RATES = RegularizationConfig(
    input_dropout=0.4, inter_layer_dropout=0.3, state_dropout=0.2, output_dropout=0.4
)
EVALUATORS: dict[str, type[Evaluator]] = {
    name: schema_of(hint)  # type: ignore[misc]
    for name, hint in get_type_hints(EvaluatorsConfig).items()
}
SETTINGS: dict[str, dict[str, Any]] = {
    "static": {"batch_size": 1, "window": 7, "temperature": 0.8},
    "dynamic": {
        "window": 4, "rule": "rms", "mean": "elements", "lr": 0.02, "decay": 0.01,
        "epsilon": 1e-3, "temperature": 0.9, "statistics_tokens": 200, "statistics_batch_size": 4,
    },
    "cache": {"weight": 0.3, "theta": 0.7, "window": 9},
    "dynamic_cache": {"weight": 0.3, "theta": 0.7, "window": 100},
    "mc_dropout": {"passes": 3, "scale": 0.8, "temperature": 0.9, "window": 6, "seed": 0},
    "rounds": {"window": 64},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at each step of one stream wait for other processes too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Leaky(LanguageModel):
    """Sees one token ahead: the input of each step is that of the next one."""

    def encode(
        self, inputs_TB: Tensor, states: States, masks: Masks | None = None
    ) -> tuple[Tensor, States]:
        return super().encode(torch.cat([inputs_TB[1:], inputs_TB[-1:]]), states, masks)


def make_model(mixture: int = 1) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=8, rounds=2, mixture=mixture), V)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # predictions far from uniform
    return model


def make_split(seed: int, size: int = N) -> Split:
    ids = np.random.default_rng(seed).integers(0, V, size).astype(np.uint16)
    return Split(ids=ids, words=size, bytes=5 * size, sha256="")


def nats(
    model: LanguageModel,
    name: str,
    text: Split,
    rates: RegularizationConfig = RATES,
    **settings: Any,
) -> dict[str, Tensor]:
    """Of each token, under the evaluator and the variants that it reports beside it."""
    evaluator, splits = EVALUATORS[name], {"train": make_split(1, 300), "test": text}
    task = Task(model, splits, 0, rates, needed=evaluator.needs)
    for needed in evaluator.needs:
        evaluate(needed, EVALUATORS[needed](**SETTINGS[needed]), task, ["test"])
    results, _ = evaluate(name, evaluator(**{**SETTINGS[name], **settings}), task, ["test"])
    evaluation = results["test"].evaluation
    assert len(evaluation.nats) == len(text.ids)
    return {"": evaluation.nats.double(), **evaluation.others}


def sums_and_pasts(
    model: LanguageModel, name: str, place: int
) -> Iterator[tuple[str, float, bool]]:
    """Whether the probabilities of all words at a place sum to 1, and leave the past alone."""
    text = make_split(2)
    found = []
    for word in range(V):
        ids = text.ids.copy()
        ids[place] = word
        found.append(nats(model, name, replace(text, ids=ids)))
    for variant in found[0]:
        total = sum(float((-f[variant][place].double()).exp()) for f in found)
        pasts = [f[variant][:place] for f in found]
        yield variant, total, all(torch.equal(past, pasts[0]) for past in pasts)


@pytest.mark.parametrize("name", EVALUATORS)
def test_it_predicts_a_distribution_from_the_past(name: str) -> None:
    for place in (0, 22):
        for variant, total, same in sums_and_pasts(make_model(), name, place):
            assert total == pytest.approx(1, abs=1e-5), (variant, place)
            assert same, (variant, place)


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_planted_leak_is_caught(name: str) -> None:
    model = make_model()
    model.__class__ = Leaky
    assert any(abs(total - 1) > 0.01 for _, total, _ in sums_and_pasts(model, name, 22))


def test_users_are_told_of_a_leak() -> None:
    model = make_model()
    check_causality(model, make_split(0), 0)
    model.__class__ = Leaky
    with pytest.raises(ValueError, match="sees the future"):
        check_causality(model, make_split(0), 0)


@pytest.mark.parametrize(
    "name, settings, rates",
    [
        ("dynamic", {"lr": 0.0}, RATES),
        ("dynamic", {"lr": 0.0, "rule": "sgd"}, RATES),
        ("cache", {"weight": 0.0}, RATES),
        ("mc_dropout", {"passes": 4}, RegularizationConfig()),
        ("mc_dropout", {"passes": 4, "scale": 0.0}, RATES),
        ("rounds", {}, RATES),
    ],
)
def test_at_its_zero_an_evaluator_is_static(
    name: str, settings: dict[str, Any], rates: RegularizationConfig
) -> None:
    model, text = make_model(), make_split(2)
    static = nats(model, "static", text, temperature=SETTINGS[name].get("temperature", 1.0))[""]
    for variant, found in nats(model, name, text, rates, **settings).items():
        if not variant.startswith("rounds"):
            assert found.double().sum().item() == pytest.approx(static.sum().item(), rel=1e-6)


@pytest.mark.parametrize("mixture", [1, 2])
@pytest.mark.parametrize("name", ["static", "dynamic", "mc_dropout"])
def test_temperatures_that_share_a_pass_are_those_tried_alone(name: str, mixture: int) -> None:
    model, text, temperatures = make_model(mixture), make_split(2), [0.7, 1.0, 1.3]
    task = Task(model, {"train": make_split(1, 300)}, 0, RATES)
    trials = [{**SETTINGS[name], "temperature": t} for t in temperatures]
    together = list(EVALUATORS[name]().score(task, Text("test", text), trials))
    for temperature, found in zip(temperatures, together, strict=True):
        alone = nats(model, name, text, temperature=temperature)
        torch.testing.assert_close(found.nats.double(), alone.pop(""))
        for variant, expected in alone.items():
            torch.testing.assert_close(found.others[variant], expected)
    assert (together[0].nats - together[2].nats).abs().max() > 0.1


@pytest.mark.parametrize("name", EVALUATORS)
def test_weights_and_rounds_are_restored_bit_for_bit(name: str) -> None:
    model, before = make_model(), make_model()
    nats(model, name, make_split(2))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert str(model) == str(before)


def test_weights_are_restored_after_an_error() -> None:
    params = [torch.ones(3)]
    with pytest.raises(KeyboardInterrupt), restored(params):
        params[0].zero_()
        raise KeyboardInterrupt
    assert torch.equal(params[0], torch.ones(3))


def test_every_evaluator_has_settings_and_a_yaml() -> None:
    from tests.conftest import compose_config

    chosen = compose_config([f"evaluators=[{','.join(EVALUATORS)}]"]).evaluators
    assert all(chosen[name] is not None for name in EVALUATORS)
    # What a setting means is said once, by the option; what is computed, by the class.
    assert all(cls.__doc__ and len(cls.__doc__) > 40 for cls in EVALUATORS.values())


def test_settings_are_known_without_torch() -> None:
    code = "import sys, mogrifier_lm.evaluators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_an_evaluator_needs_has_to_run_before_it() -> None:
    from tests.conftest import compose_config

    names = list(EVALUATORS)
    for name, evaluator in EVALUATORS.items():
        for needed in evaluator.needs:
            assert names.index(needed) < names.index(name)
            with pytest.raises(UserError, match=f"evaluators=.{name}. needs {needed} beside it"):
                validate(compose_config([f"evaluators=[{name}]"]))


def test_passes_share_masks_over_the_windows_of_training() -> None:
    from tests.conftest import compose_config

    config = validate(compose_config(["evaluators=[mc_dropout]", "trainer.bptt=17"]))
    assert config.evaluators.mc_dropout is not None and config.evaluators.mc_dropout.window == 17
    wrong = ["evaluators=[mc_dropout]", "evaluators.mc_dropout.scale=[1,4.0]",
             "regularization.state_dropout=0.25"]  # fmt: skip
    with pytest.raises(UserError, match="scale is up to 4, which takes the dropout rate 0.25 to 1"):
        validate(compose_config(wrong))
