"""What only a CUDA device can show: python -m pytest -m gpu."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mogrifier_lm import regularization
from mogrifier_lm.data import Streams
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.kernels.recurrence import resolve
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import ModelConfig, OptimizerConfig, RegularizationConfig, TrainerConfig
from mogrifier_lm.regularization import draw_masks
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training.averaging import Averaging
from mogrifier_lm.training.optim import build_optimizer
from mogrifier_lm.training.trainer import Trainer
from tests.evaluators import test_contract
from tests.kernels.test_recurrence import OPTIONS, SEEDS, UNIT, Problem, near_the_cap, problem
from tests.test_recipes import PUBLISHED, config_of, train_twenty_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RATES = {f"{name}_dropout": 0.3 for name in ("input", "inter_layer", "state", "output")}


def on_gpu(case: Problem) -> Problem:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().cuda().requires_grad_(tensor.requires_grad)

    return replace(
        case,
        x=moved(case.x),
        h=moved(case.h),
        c=moved(case.c),
        mask=None if case.mask is None else moved(case.mask),
        parameters={name: moved(p) for name, p in case.parameters.items()},
        d_outputs=[moved(d) for d in case.d_outputs],
    )


def errors(option: str, precision: str, sizes: tuple[int, int, int, int]) -> dict[str, list[float]]:
    """Of each output and gradient the root mean square error, of triton and of the reference."""
    squares: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        exact = problem(option, sizes, seed=seed).run_backward("reference")
        case = on_gpu(problem(option, sizes, torch.float32, seed=seed))
        with torch.autocast("cuda", torch.bfloat16, precision == "bf16", cache_enabled=False):
            runs = [case.run_backward(backend) for backend in ("triton", "reference")]
        for name, e in exact.items():
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, run in enumerate(runs):
                assert run[name].dtype == torch.float32
                sums[i] += float((run[name].cpu().double() - e).square().sum())
            sums[2] += float(e.square().sum())
    return {name: [math.sqrt(s / scale) for s in two] for name, (*two, scale) in squares.items()}


def test_auto_is_triton() -> None:
    assert resolve("auto", "cuda") == "triton"
    assert resolve("auto", "cuda", dtype=torch.float64) == "fused"


@pytest.mark.parametrize("precision", UNIT)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_ladder(option: str, precision: str) -> None:
    if precision == "bf16" and near_the_cap(option):
        pytest.skip("rounding in bf16 tips min(i, 1 - f) over, where its gradient jumps")
    # Each size is compiled for itself, so the larger ones, and one stream, are for a few options.
    more = [(3, 33, 130, 50), (5, 1, 130, 50)]
    larger = option in ("lstm capped", "low rank", "mogrifier rlstm")
    for sizes in ((7, 3, 13, 17), *(more if larger else [])):
        for name, (ours, theirs) in errors(option, precision, sizes).items():
            tiny = UNIT[precision] * math.sqrt(sizes[2] + sizes[3])  # a gate sums over I and H
            assert ours <= 2 * theirs + tiny, (name, sizes)


@pytest.mark.parametrize("precision", UNIT)
def test_a_wavefront_has_the_bits_of_one_layer_after_the_other(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mogrifier_lm.kernels.recurrence.triton import wavefront

    torch.manual_seed(0)
    model = LanguageModel(50, 40, layer_specs([40] * 4, rounds=3, rank=8), device="cuda")
    tokens, targets = torch.randint(50, (2, 23, 5), device="cuda")
    shapes, generator = model.mask_shapes, torch.Generator("cuda").manual_seed(0)
    masks = draw_masks(RegularizationConfig(**RATES), shapes, (23, 5), generator)

    def values() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, precision == "bf16", cache_enabled=False):
            loss, _ = model.loss(tokens, targets, model.zero_states(5), masks)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def one_by_one(run, layers, spans, device):
        for layer in layers:
            for span in spans:
                run(layer, span)

    together = values()
    assert all(torch.equal(a, b) for a, b in zip(together, values(), strict=True))
    monkeypatch.setattr(wavefront, "in_waves", one_by_one)
    assert all(torch.equal(a, b) for a, b in zip(together, values(), strict=True))


def trainer_of(
    folder: Path, steps: int, backend: str, precision: str, dropout: bool, parts: int = 1
) -> Trainer:
    """Of a small model on a text of which something can be learned."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=48, num_layers=2, rounds=3, rank=8, backend=backend)
    model = build_model(config, 50, "cuda")
    random = np.random.default_rng(0)
    ids = (np.arange(8 * 600) * 7 + random.integers(0, 5, 8 * 600)) % 50
    return Trainer(
        model=model,
        train=Streams(ids.astype(np.uint16), 8, eos_id=0),
        optimizer=build_optimizer(OptimizerConfig(name="adam", lr=0.003), model.parameters()),
        averaging=Averaging(model.parameters()),
        regularization=RegularizationConfig(**(RATES if dropout else {})),
        config=TrainerConfig(
            max_steps=steps,
            bptt=20,
            valid_every=20,
            log_every=10,
            precision=precision,
            accumulation_steps=parts,
        ),
        validate=lambda: Score(nats=1.0, tokens=1, words=1, bytes=1),
        files=RunFolder(folder),
        seed=0,
    )


@pytest.mark.parametrize("precision", UNIT)
def test_two_hundred_steps_have_the_fused_backends_losses(precision: str, tmp_path: Path) -> None:
    """Within what the reference, which sums in yet another order, differs from it."""

    def losses(backend: str) -> np.ndarray:
        folder = tmp_path / backend
        folder.mkdir()
        trainer_of(folder, 200, backend, precision, dropout=False).fit()
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return np.array([row["train/nats"] for row in rows if "train/nats" in row])

    fused, triton, reference = (losses(name) for name in ("fused", "triton", "reference"))
    assert len(fused) == 20 and fused[-1] < 0.8 * fused[0]
    spread = max(abs(reference - fused).max(), 1e-3 * fused[-1])
    assert abs(triton - fused).max() <= 5 * spread


@pytest.mark.parametrize("parts", [1, 2])
def test_a_resumed_run_has_the_same_bits(parts: int, tmp_path: Path) -> None:
    def fit(folder: Path, steps: int, resume: bool = False) -> Tensor:
        folder.mkdir(exist_ok=True)
        trainer = trainer_of(folder, steps, "triton", "bf16", dropout=True, parts=parts)
        if resume:
            trainer.load()
        trainer.fit()
        trainer.load()  # the last weights, not the best
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole = fit(tmp_path / "whole", 80)
    fit(tmp_path / "cut", 40)
    assert torch.equal(whole, fit(tmp_path / "cut", 80, resume=True))


@pytest.mark.parametrize("name", test_contract.EVALUATORS)
def test_every_evaluator_has_the_cpus_nats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = test_contract.make_split(2, 200)

    def drawn(config, shapes, size, generator):  # the same masks on both
        device = generator.device
        masks = draw_masks(config, shapes, size, torch.Generator().manual_seed(size[0]))
        return {k: mask.to(device) for k, mask in masks.items()}

    monkeypatch.setattr(regularization, "draw_masks", drawn)
    expected = test_contract.nats(test_contract.make_model(), name, text)
    found = test_contract.nats(test_contract.make_model().cuda(), name, text)
    for variant, nats in expected.items():
        torch.testing.assert_close(
            found[variant].cpu().double(), nats.double(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_seed_starts_from_the_same_weights_and_a_recipe_trains(name: str, tmp_path: Path) -> None:
    config, vocabulary = config_of(name), PUBLISHED[name][1]
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = build_model(config.model, 300, device)
        values = [p.detach().cpu() for p in model.parameters()]
        if device == "cpu":
            expected = values
    assert all(torch.equal(a, b) for a, b in zip(expected, values, strict=True))
    config.trainer.precision = "bf16"
    values = train_twenty_steps(config, tmp_path, vocabulary, "cuda")
    assert len(values) == 8 and all(math.isfinite(value) for value in values)
