"""A cell is a file: what one has to say, with a GRU, whose state is h alone, as the example."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from mogrifier_lm.cells import CELLS, CellSpec, RecurrentLayer
from mogrifier_lm.cells.cell import Cell
from mogrifier_lm.data import Split, Streams
from mogrifier_lm.evaluators.cache import Cache
from mogrifier_lm.evaluators.dynamic import Dynamic
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.evaluators.static import Static
from mogrifier_lm.evaluators.task import Task, evaluate
from mogrifier_lm.kernels.recurrence import Options, State, Weights
from mogrifier_lm.options import ModelConfig, OptimizerConfig, RegularizationConfig, TrainerConfig
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training import checkpoint
from mogrifier_lm.training.averaging import Averaging
from mogrifier_lm.training.optim import build_optimizer
from mogrifier_lm.training.trainer import Trainer

V = 20
IDS = np.random.default_rng(0).integers(0, V, 300).astype(np.uint16)


def step(x: Tensor, state: State, w: Weights, options: Options, mask: Tensor | None) -> State:
    (h,) = state
    rx, zx, nx = linear(x, w.ih, w.bias).chunk(3, dim=1)
    rh, zh, nh = linear(h, w.hh, w.more.get("bias_hh")).chunk(3, dim=1)
    r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
    return ((1 - z) * torch.tanh(nx + r * nh) + z * h,)


def shapes(n_in: int, n: int) -> dict[str, tuple[int, ...]]:
    biases = {"bias": (3 * n,), "bias_hh": (3 * n,)}
    return {"weight_ih": (3 * n, n_in), "weight_hh": (3 * n, n), **biases}


@pytest.fixture(autouse=True)
def gru(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CELLS, "gru", Cell(step, shapes, state=("h",)))


def trainer_of(folder: Path, steps: int) -> Trainer:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = build_model(ModelConfig(cell="gru", hidden_size=8, rounds=2, num_layers=2), V)
    return Trainer(
        model=model,
        train=Streams(IDS, 4, 0),
        optimizer=build_optimizer(OptimizerConfig(name="adam", lr=0.01), model.parameters()),
        averaging=Averaging(model.parameters()),
        regularization=RegularizationConfig(state_dropout=0.2, weight_dropout=0.2, reset_state=0.1),
        config=TrainerConfig(bptt=7, batch_size=4, max_steps=steps, max_epochs=None),
        validate=lambda: Score(nats=1.0, tokens=1, words=1, bytes=1),
        files=RunFolder(folder),
        seed=0,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_its_step_alone_makes_a_layer(bias):
    torch.manual_seed(0)
    layer = RecurrentLayer(CellSpec(input_size=5, hidden_size=7, cell="gru", bias=bias))
    assert layer.backend == "reference"
    theirs = nn.GRU(5, 7, bias=bias)
    names = {"bias": "bias_ih_l0", "bias_hh": "bias_hh_l0"}
    theirs.load_state_dict(
        {names.get(k, f"{k}_l0"): v for k, v in layer.state_dict().items()}, strict=True
    )
    x, h = torch.randn(6, 3, 5), torch.randn(3, 7)
    output, (h_n,) = layer(x, (h,))
    expected, expected_h = theirs(x, h.unsqueeze(0))
    torch.testing.assert_close((output, h_n), (expected, expected_h[0]))
    assert len(layer.zero_state(3)) == 1


def test_a_run_that_is_cut_goes_on_to_the_same_weights(tmp_path):
    whole = trainer_of(tmp_path / "whole", 12)
    whole.fit()
    trainer_of(tmp_path / "parts", 5).fit()
    with safe_open(RunFolder(tmp_path / "parts").last, "pt") as file:
        assert {k for k in file.keys() if k.startswith("state")} == {"state.0.h", "state.1.h"}  # noqa: SIM118
    resumed = trainer_of(tmp_path / "parts", 12)
    resumed.load()
    resumed.fit()
    once, twice = (checkpoint.load(RunFolder(tmp_path / k).last)[0] for k in ("whole", "parts"))
    for name, value in once.items():
        if not name.startswith("best."):  # every validation is equal here: the first stays the best
            assert torch.equal(value, twice[name]), name


def test_evaluators_score_it():
    torch.manual_seed(0)
    model = build_model(ModelConfig(cell="gru", hidden_size=8, rounds=2), V)
    split = Split(ids=IDS[:60], words=60, bytes=60, sha256="")
    task = Task(model=model, splits={"train": split, "valid": split}, eos_id=0)
    dynamic = Dynamic(window=6, lr=[0.01], statistics_tokens=60, statistics_batch_size=2)
    for name, evaluator in (("static", Static()), ("dynamic", dynamic), ("cache", Cache())):
        results, _ = evaluate(name, evaluator, task, ["valid"])
        nats = results["valid"].evaluation.nats
        assert nats.shape == (60,) and nats.isfinite().all(), name


def test_chrono_values_for_a_cell_without_such_gates_are_refused():
    with pytest.raises(ValueError, match="chrono_t_max has no meaning for a gru cell"):
        CellSpec(input_size=5, hidden_size=7, cell="gru", chrono_t_max=20)


def test_an_unknown_cell_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="cell is 'gro', it must be one of lstm, .*gru"):
        CellSpec(input_size=5, hidden_size=7, cell="gro")
