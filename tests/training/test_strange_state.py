"""A checkpoint that is whole, but of another run or of nobody's: refused, and nothing is read
beyond what it holds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogrifier_lm.config import load_config
from mogrifier_lm.errors import UserError
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.runs.run import run
from mogrifier_lm.training import checkpoint
from tests.conftest import train

Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def of_progress(**values: Any) -> Change:
    return lambda tensors, saved: saved["progress"].update(values)


CHANGES: dict[str, Change] = {
    "a moment of another size": lambda t, v: t.update({"optimizer.1.exp_avg": torch.zeros(2)}),
    "a moment of integers": lambda t, v: t.update(
        {"optimizer.2.exp_avg_sq": t["optimizer.2.exp_avg_sq"].int()}
    ),
    "no second moment": lambda t, v: t.pop("optimizer.3.exp_avg_sq"),
    "a parameter too many": lambda t, v: t.update({"optimizer.77.step": torch.zeros(())}),
    "a state that would spread": lambda t, v: t.update({"state.0.h": torch.ones(1, 1)}),
    "an average that would spread": lambda t, v: t.update({"averaging.average.0": torch.ones(1)}),
    "sums of one": lambda t, v: t.update({"sums": torch.ones(1).double()}),
    "no progress": lambda t, v: v.update(progress=[3]),
    "a rate that is a text": lambda t, v: v.update(peak_lr="0.1"),
    "a rate without end": lambda t, v: v.update(peak_lr=float("inf")),
    "an average's text": lambda t, v: v.update(averaging="none"),
    "steps in a list": of_progress(step=[4]),
    "half a token": of_progress(tokens=0.5),
    "no best": of_progress(best_ppl=None),
    "before the text": of_progress(position=-20),
    "beyond the text": of_progress(position=10**12),
    "more pause than time": of_progress(pause_seconds=1e9),
    "a log of a text's length": of_progress(metrics_bytes="8"),
}


@pytest.mark.slow
def test_a_state_that_is_none_of_the_run_is_refused(small: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    train([*small, "optimizer.averaging=ema", "trainer.max_steps=3"], tmp_path)
    tensors, values = checkpoint.load(folder.last)
    config = load_config(folder.config)
    config.trainer.max_steps = 4
    for name, change in CHANGES.items():
        changed, saved = dict(tensors), copy.deepcopy(values)
        change(changed, saved)
        checkpoint.save(folder.last, changed, saved)
        with pytest.raises(UserError, match="does not fit this run"):
            run(config, folder)
            pytest.fail(f"{name} was taken")
    checkpoint.save(folder.last, tensors, values)
    assert run(config, folder)["steps"] == 4


@pytest.mark.parametrize(
    "content",
    ['{"name": ["word"]}', '{"name": "word", "words": "<eos>"}', '{"name": "word", "words": [1]}',
     '{"name": "word", "words": ["a", "a", "<eos>"]}', '{"name": "word", "words": ["a"]}',
     '{"name": "word", "words": ["\\ud800", "<eos>"]}', '{"name": "word", "form": 3}', "[]",
     '{"name": "sentencepiece", "form": {"x": 1}}'],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    from mogrifier_lm.data import load_tokenizer

    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "tokenizer.json")
