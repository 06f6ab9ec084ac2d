"""Golden curves of whole recipes, from the overrides of a command to metrics.jsonl.

As test_golden.py, for what is not of the model alone: regularizers, averages of the weights with
their validation perplexities, optimizers, initial values, streams. To write the figures anew:
python -m tests.test_golden_recipes
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors.torch import load_file

from mogrifier_lm.errors import UserError
from mogrifier_lm.kernels.recurrence import BACKENDS
from tests.conftest import train, write_text

FILE = Path(__file__).with_name("golden_recipes.json")
BASE = [
    "data=text", "tracker=none", "evaluators=[]", "model.hidden_size=12", "model.num_layers=2",
    "model.rounds=2", "trainer.batch_size=4", "trainer.bptt=10", "trainer.max_epochs=null",
    "trainer.max_steps=50", "trainer.valid_every=10", "trainer.log_every=10", "trainer.threads=1",
    "model.unigram_bias=false", "optimizer.lr=0.02", "trainer.lr_decay=none",
    "trainer.clip=0.25",
]  # fmt: skip
CLOCK = ("seconds", "train/tokens_per_second")  # keys of what is another time another figure
FASTER = ["optimizer.lr=0.06"]  # so that averages and raw weights are far apart
RECIPES: dict[str, list[str]] = {
    # Word dropout and DropConnect, locked masks, AR and TAR, windows of varying length, and SGD
    # that is averaged from where validation stops falling.
    "awd": [
        "model=lstm", "regularization=awd", "optimizer=nt_asgd", "model.num_layers=3",
        "model.top_hidden_size=10", "model.embedding_size=10", "trainer.variable_bptt=true",
        "optimizer.averaging_patience=1", "optimizer.lr=20"],
    # Masks per step, L2, loss per window, read heads, states reset, the tail averaged, Adam with
    # beta1 0, truncated normals.
    "melis": [
        "regularization=melis2020", "optimizer=melis2020", "model.init=melis2020",
        "trainer.streams=read_heads",
        "trainer.loss_per=window", "trainer.clip=10.0",
        "optimizer.averaging_patience=2", "optimizer.lr=0.01",
    ],
    "tail": [*FASTER, "optimizer.averaging=tail", "optimizer.averaging_start=0.5"],
    "tail, from the start": [*FASTER, "optimizer.averaging=tail", "optimizer.averaging_start=0"],
    "ema": [*FASTER, "optimizer.averaging=ema", "optimizer.averaging_decay=0.9"],
    "two_tailed": [*FASTER, "optimizer.averaging=two_tailed", "optimizer.averaging_patience=2"],
    "mixture": ["model.mixture=3"],
    "samples": ["regularization.samples=3", "regularization.state_dropout=0.3"],
    "rlstm": ["model.cell=rlstm", "model.init=melis2020"],
    "mlstm": ["model.cell=mlstm", "regularization.weight_dropout=0.3"],
    "radam": ["optimizer.name=radam"],
    "adamw": ["optimizer=adamw", "optimizer.lr=0.02", "optimizer.weight_decay=0.1"],
    "residual": ["model.residual=true"],
    "skip sum": ["model.skip_sum=true", "model.rank=4"],
    "chrono": ["model.chrono_t_max=20"],
    "untied, linear decay": [
        "trainer.lr_decay=linear", "model.tie_embeddings=false", "model.embedding_ratio=0.5"],
    "bf16": ["trainer.precision=bf16"],
}  # fmt: skip
ON_AUTO = ("awd", "melis")  # recipes that the kernel chosen by `auto` trains, too
# Sums of float32 in another order (the fused and the native kernel, AVX2 and no vector instructions
# in the place of AVX512) moved nats and perplexities by up to 1.3e-6 of themselves, gradient norms
# by 5e-5. bfloat16 rounds the products, each kernel its own: 4e-3 and 2e-2.
TOLERANCE, TOLERANCE_BF16 = 2e-5, 1e-2
GRADIENTS, GRADIENTS_BF16 = 5e-4, 5e-2


def curve(name: str, backend: str, folder: Path) -> dict[str, list[float]]:
    """Key → its values over 50 steps: nats, gradient norms and rates, perplexities per average."""
    write_text(folder / "text", 1500, 200, vocab_size=200)
    where = [f"data.dir={folder / 'text'}", f"data.cache_dir={folder / 'cache'}"]
    overrides = [*BASE, *where, *RECIPES[name], f"model.backend={backend}"]
    rows = train(overrides, folder / "run")
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in (*CLOCK, "train/ppl", "valid/nats"):
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "reference") for name in RECIPES), *((name, "auto") for name in ON_AUTO)],
)
def test_fifty_steps_give_the_golden_curves(name: str, backend: str, tmp_path: Path) -> None:
    found, golden = curve(name, backend, tmp_path), json.loads(FILE.read_text())[name]
    assert found.keys() == golden.keys()
    for key, values in golden.items():
        tolerance = GRADIENTS if key == "train/grad_norm" else TOLERANCE
        if name == "bf16":
            tolerance = GRADIENTS_BF16 if key == "train/grad_norm" else TOLERANCE_BF16
        assert found[key] == pytest.approx(values, rel=tolerance), key


def test_the_golden_curves_are_of_different_recipes() -> None:
    """A setting that had no effect would leave the curve of another recipe."""
    curves = json.loads(FILE.read_text())
    assert curves.keys() == RECIPES.keys()
    seen = [json.dumps([curve["train/nats"], curve["valid/ppl"]]) for curve in curves.values()]
    assert len(set(seen)) == len(seen)
    averaged = {k for k, v in curves.items() if "valid/average/ppl" in v or "valid/long/ppl" in v}
    of_tail = {"tail", "tail, from the start"}
    assert averaged == {"awd", "melis", "ema", "two_tailed"} | of_tail


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_lstm_is_a_mogrifier_without_rounds(
    backend: str, small: list[str], tmp_path: Path
) -> None:
    rows, weights = [], []
    for i, model in enumerate((["model=lstm"], ["model=mogrifier", "model.rounds=0"])):
        overrides = [*small, *model, f"model.backend={backend}", "trainer.threads=1"]
        try:
            found = train([*overrides, "evaluators=[]"], tmp_path / str(i))
        except UserError as error:  # a kernel that cannot run here says why
            assert backend in str(error)
            pytest.skip(str(error))
        rows.append([{k: v for k, v in row.items() if k not in CLOCK} for row in found])
        (best,) = (tmp_path / str(i) / "checkpoints/best").glob("*.safetensors")
        weights.append(load_file(best))
    assert rows[0] == rows[1] and len(rows[0]) > 5
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


if __name__ == "__main__":
    golden = {}
    for name in RECIPES:
        with TemporaryDirectory() as folder:
            golden[name] = curve(name, "reference", Path(folder))
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
