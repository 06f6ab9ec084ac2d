"""The captured training step: the same code without capture here, the capture on a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mogrifier_lm.data import Streams
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.kernels import graphs
from mogrifier_lm.kernels.graphs import Graphed
from mogrifier_lm.options import ModelConfig, OptimizerConfig, RegularizationConfig, TrainerConfig
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training.averaging import Averaging
from mogrifier_lm.training.optim import build_optimizer
from mogrifier_lm.training.trainer import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def weights_after(
    steps: int, device: str, folder: Path, name: str, precision: str, dropout: float
) -> torch.Tensor:
    """All weights after some steps over a text whose last window is shorter."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=24, rounds=3, num_layers=2), 50, device)
    ids = np.random.default_rng(0).integers(0, 50, 4 * 47).astype(np.uint16)
    trainer = Trainer(
        model=model,
        train=Streams(ids, 4, eos_id=0),
        optimizer=build_optimizer(OptimizerConfig(name=name, lr=0.01), model.parameters()),
        averaging=Averaging(model.parameters()),
        regularization=RegularizationConfig(
            input_dropout=dropout,
            inter_layer_dropout=dropout,
            state_dropout=dropout,
            output_dropout=dropout,
        ),
        config=TrainerConfig(
            max_steps=steps, bptt=10, valid_every=steps // 2, lr_drop=0.5, precision=precision
        ),
        validate=lambda: Score(nats=1.0, tokens=1, words=1, bytes=1),
        files=RunFolder(folder),
        seed=0,
    )
    trainer.fit()
    trainer.load()  # the last weights, not the best
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


def test_on_a_cpu_the_function_is_called_each_time() -> None:
    total = torch.zeros(2)
    add = Graphed(lambda x, y: total.add_(x if y is None else x + y), torch.device("cpu"))  # type: ignore[arg-type,return-value]
    for _ in range(5):
        add(torch.ones(2), None)
    add(torch.ones(2), torch.ones(2))
    assert total.tolist() == [7, 7]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_captured_steps_train_as_eager_ones(
    precision: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, two window lengths, a drop of the learning rate, epochs: all under capture."""
    captured = weights_after(40, "cuda", tmp_path / "a", name, precision, 0.3)
    monkeypatch.setattr(graphs, "WARMUP", 10**9)
    eager = weights_after(40, "cuda", tmp_path / "b", name, precision, 0.3)
    torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_trains_as_a_cpu(tmp_path: Path) -> None:
    # Masks differ between devices, so without dropout; Adam's first step has the size of the rate
    # whatever the gradient's, so with SGD.
    gpu = weights_after(8, "cuda", tmp_path / "a", "sgd", "fp32", 0.0)
    cpu = weights_after(8, "cpu", tmp_path / "b", "sgd", "fp32", 0.0)
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


def test_dropout_masks_change_what_is_learned(tmp_path: Path) -> None:
    with_masks = weights_after(4, "cpu", tmp_path / "a", "sgd", "fp32", 0.3)
    without = weights_after(4, "cpu", tmp_path / "b", "sgd", "fp32", 0.0)
    assert not torch.allclose(with_masks, without)
