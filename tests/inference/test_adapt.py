"""Scores of a model that adapts as it reads are those of the dynamic evaluator."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.dynamic import Dynamic, root_mean_squares
from mogrifier_lm.evaluators.task import Task, Text
from mogrifier_lm.inference.adapt import UNTUNED, _coded, _decoded
from mogrifier_lm.inference.trained import TrainedModel
from mogrifier_lm.launch.commands.export import main as export
from mogrifier_lm.launch.commands.score import main as score
from mogrifier_lm.runs.build import saved_corpus
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training import checkpoint
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "tests/fixtures/v0", tmp_path / "v0")
    monkeypatch.chdir(tmp_path / "v0")
    return tmp_path / "v0"


def evaluated(model: TrainedModel) -> list[float]:
    """Nats of the run's test text by the evaluator, with what the run has tuned, temperature 1."""
    corpus = saved_corpus(RunFolder("run"))
    entry = RunFolder("run").read_summary()["test"]["dynamic"]
    settings = {key: entry[key] for key in UNTUNED} | {"temperature": 1.0}
    assert settings["lr"] == 0.004 and settings["decay"] == 0.001
    task = Task(model, corpus.splits, corpus.tokenizer.eos_id)
    (found,) = Dynamic().score(task, Text("test", corpus.splits["test"]), [settings])
    nats: list[float] = found.nats.double().tolist()
    return nats


def test_a_run_and_what_is_exported_of_it_score_as_the_dynamic_evaluator(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("text/test.txt").read_text()
    model = load_model("run")
    static = [w.nats for w in model.score(text, "text")]
    adapted = [w.nats for w in model.score(text, "text", adapt=True)]
    assert adapted == evaluated(model)
    assert adapted[:20] == static[:20] and sum(adapted) < sum(static) - 1
    assert [w.nats for w in model.score(text, "text")] == static, "the trained weights are back"
    export(run="run", to="fp32")
    export(run="run", to="bf16", dtype="bf16")
    sizes = [RunFolder(name).statistics.stat().st_size for name in ("fp32", "bf16")]
    assert abs(sizes[0] - sizes[1] - 3 * model.num_params()) < 1000, "four bytes a weight, or one"
    Path("text").rename("gone")  # an exported folder needs no text
    given = load_model("fp32")
    assert [w.nats for w in given.score(text, "text", adapt=True)] == adapted
    small = load_model("bf16")
    Path("gone").rename("text")
    coarse = [w.nats for w in small.score(text, "text", adapt=True)]
    assert coarse == pytest.approx(evaluated(small), rel=0.01)
    assert sum(coarse) == pytest.approx(sum(evaluated(small)), rel=1e-4)
    Path("test.txt").write_text(text)
    capsys.readouterr()
    score(run="fp32", text="test.txt", unit="text", adapt=True, to="out.tsv")
    said = capsys.readouterr().err
    assert f"{sum(adapted):.4f} nats" in said
    assert "adapt=true (rms, window 20, lr 0.004, decay 0.001, epsilon 0.0001, as tuned)" in said


def test_each_line_begins_anew_and_the_weights_go_on(folder: Path) -> None:
    """Against the equations of Krause et al., written out."""
    summary = RunFolder("run").summary
    summary.write_text(summary.read_text().replace('"lr": 0.004', '"lr": 0.01'))
    model, lines = load_model("run"), Path("text/test.txt").read_text().splitlines()[:4]
    settings = model.adaptation.settings
    found = [w.nats for w in model.score([*lines, lines[0]], adapt=True)]
    params, expected = list(model.parameters()), []
    trained = [p.detach().clone() for p in params]
    corpus = saved_corpus(RunFolder("run"))
    rms = root_mean_squares(Task(model, corpus.splits, corpus.tokenizer.eos_id), settings)
    mean = torch.cat([r.flatten() for r in rms]).mean()
    for line in [*lines, lines[0]]:
        ids, states = model.tokenizer.encode([line]).tolist(), model.zero_states(1)
        for at in range(0, len(ids), 20):
            inputs = torch.tensor([model.tokenizer.eos_id, *ids])[at : at + len(ids[at : at + 20])]
            hidden, states = model.encode(inputs[:, None], states)
            logits = hidden @ model.output_weight.T + model.output_bias
            targets = torch.tensor(ids[at : at + 20])
            nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            expected += nats.tolist()
            gradients = torch.autograd.grad(nats.mean(), params)
            states = [tuple(s.detach() for s in state) for state in states]
            with torch.no_grad():
                for p, g, r, w in zip(params, gradients, rms, trained, strict=True):
                    pull = (0.001 * r / mean).clamp(max=1) * (w - p)
                    p += pull - 0.01 * g / (r + 1e-4)
    # A word's nats are a difference of numbers near 10, rounded to float32: to about 1e-6.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [w.sentence for w in model.score(lines, adapt=True) if w.position == 1] == [1, 2, 3, 4]


def test_a_byte_holds_a_statistic_to_a_few_percent() -> None:
    rms = torch.logspace(-9, -1, 1000).reshape(10, 100)
    rms[3, :50] = 0
    code, (low, high) = _coded(rms)
    again = _decoded(code, low, high)
    assert code.dtype == torch.uint8 and (again[3, :50] == 0).all()
    step = math.exp((high - low) / 508) * (1 + 1e-5)
    ratio = again[rms > 0] / rms[rms > 0]
    assert 1 / step <= ratio.min() and ratio.max() <= step < 1.04
    for flat in (torch.zeros(4), torch.full((3,), 2.5)):
        torch.testing.assert_close(_decoded(_coded(flat)[0], *_coded(flat)[1]), flat)


def test_without_statistics_or_with_anothers_it_is_one_line(folder: Path) -> None:
    export(run="run", to="out", adapt=False)
    export(run="run", to="whole")
    tensors, values = checkpoint.load(RunFolder("whole").statistics)
    settings = values["settings"]

    def refused(says: str, name: str = "whole") -> None:
        with pytest.raises(UserError, match=says):
            load_model(name).score("a", adapt=True)

    refused("out was exported without statistics: adapt=true needs them", "out")
    for damage, says in (
        ({"window": 0}, "is damaged: settings out of range"), ({"lr": -1.0}, "out of range"),
        ({"decay": float("nan")}, "out of range"), ({"window": "x"}, "is damaged: invalid literal"),
    ):  # fmt: skip
        changed = {"settings": settings | damage, "spans": {}}
        checkpoint.save(RunFolder("whole").statistics, tensors, changed)
        refused(says)
    checkpoint.save(RunFolder("whole").statistics, tensors, {"settings": settings})
    refused("is damaged: 'spans'")
    other = tensors | {"output_bias": torch.zeros(3)}
    checkpoint.save(RunFolder("whole").statistics, other, values)
    refused("output_bias is of another model")
    for damage in (math.nan, math.inf):
        checkpoint.save(
            RunFolder("whole").statistics,
            tensors | {"output_bias": tensors["output_bias"] * damage},
            values,
        )
        refused("output_bias is of another model, or holds no numbers")
    checkpoint.save(
        RunFolder("whole").statistics, {k: v.double() for k, v in tensors.items()}, values
    )
    load_model("whole").score("a", adapt=True)
    Path("whole/counts.json").write_text('{"counts": [1, 2]}')
    with pytest.raises(UserError, match="counts.json is damaged: no number for each word"):
        load_model("whole").score("a")
    Path("text").rename("gone")
    refused("text", "run")
