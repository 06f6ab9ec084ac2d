"""The adaptive softmax: one exact distribution over all types, learned and scored in parts."""

import json
from pathlib import Path

import pytest
import torch

from mogrifier_lm.config import validate
from mogrifier_lm.data import IGNORE
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.job import run_in
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.runs.build import build_model, start_bias
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import compose_config

V, E, CUTOFFS = 50, 16, [7, 20, 41]


def model(backend: str = "auto", hidden: int = E) -> LanguageModel:
    torch.manual_seed(0)
    specs = layer_specs([E, hidden], rounds=2)
    made = LanguageModel(V, E, specs, adaptive_softmax=CUTOFFS, backend=backend)
    assert made.tails is not None
    with torch.no_grad():
        made.output_bias.normal_()
        made.tails.bias.normal_()
    return made


@pytest.mark.parametrize("hidden", [E, 12])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_it_is_one_distribution(temperature: float, hidden: int) -> None:
    lm = model(hidden=hidden)
    targets = torch.tensor([*range(V), IGNORE])
    features = torch.randn(len(targets), E)
    log_p = lm.log_probs(features, temperature)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(len(targets)), atol=1e-5)
    expected = -log_p[:V].gather(1, targets[:V, None]).squeeze(1)
    nats = lm.output_nats(features, targets, temperature)
    assert torch.allclose(nats, torch.cat([expected, torch.zeros(1)]), atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "targets", [[0, 6, 7, 19, 20, 40, 41, 49, IGNORE], [3, 3, IGNORE], [45], [IGNORE]]
)
def test_the_gradient_is_that_of_the_whole_distribution(backend: str, targets: list[int]) -> None:
    lm, target = model(backend), torch.tensor(targets)
    features = torch.randn(len(targets), E, requires_grad=True)
    parameters = [features, *lm.parameters()]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
        ]

    assert lm.tails is not None
    log_p = type(lm).log_probs.__wrapped__(lm, features)  # type: ignore[attr-defined]
    kept = target != IGNORE
    naive = -log_p[kept].gather(1, target[kept, None]).sum()
    loss = lm.output_loss(features, target)
    assert torch.allclose(loss, naive, atol=1e-4)
    for a, b in zip(gradients(loss), gradients(naive), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_inputs_are_the_vectors_of_their_clusters() -> None:
    lm = model()
    assert lm.tails is not None
    ids = torch.tensor([[0, 6], [7, 19], [20, 40], [41, 49]])
    found = lm.embed(ids)
    tables, up = lm.tails.tables, lm.tails.projections
    assert torch.equal(found[0], lm.embedding_weight[ids[0]])
    for k, low in enumerate(CUTOFFS):
        assert torch.allclose(found[k + 1], tables[k][ids[k + 1] - low] @ up[k], atol=1e-6)
    assert [t.shape[1] for t in tables] == [4, 1, 1]


def test_the_first_bias_gives_the_frequencies_of_the_text() -> None:
    lm = model()
    ids = torch.arange(V).repeat_interleave(torch.arange(V, 0, -1))
    start_bias(lm, ids.numpy())
    p = lm.log_probs(torch.zeros(1, E)).exp()[0]
    counts = torch.bincount(ids, minlength=V) + 1.0
    assert torch.allclose(p, counts / counts.sum(), atol=1e-6)


def test_cutoffs_that_do_not_fit_are_named() -> None:
    for cutoffs in ([20, 7], [7, 50], [7, 7]):
        config = ModelConfig(hidden_size=8, adaptive_softmax=cutoffs)
        with pytest.raises(UserError, match="model.adaptive_softmax is .* below the 50 types"):
            build_model(config, V)
    for wrong in ("model.mixture=2", "model.tie_embeddings=false", "regularization.samples=2"):
        with pytest.raises(UserError, match="adaptive_softmax needs model.tie_embeddings=true"):
            validate(compose_config(["model.adaptive_softmax=[7]", wrong]))


def test_a_run_with_every_evaluator_that_needs_log_probabilities(
    small: list[str], tmp_path: Path
) -> None:
    overrides = [*small, "model.adaptive_softmax=[20,60]", "evaluators=[static,dynamic,cache]"]
    overrides += ["evaluators.dynamic.lr=[1e-3]", "evaluators.dynamic.decay=[1e-3]"]
    overrides += ["evaluators.cache.weight=[0.1]", "evaluators.cache.theta=[0.3]"]
    overrides += ["evaluators.cache.window=[50]", "optimizer.averaging=two_tailed"]
    (tmp_path / "run").mkdir()
    run_in(compose_config(overrides), RunFolder(tmp_path / "run"), [])
    test = json.loads((tmp_path / "run/summary.json").read_text("utf-8"))["test"]
    assert all(1 < test[name]["ppl"] < 1000 for name in ("static", "dynamic", "cache"))
