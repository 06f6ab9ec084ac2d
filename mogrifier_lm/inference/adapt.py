"""Dynamic evaluation while a text is scored: the model adapts to what it has read.

Each window is scored first and learned from then, as `evaluators.dynamic` does (Krause et al.,
arXiv 1709.07432); van Schijndel and Linzen (EMNLP 2018) take its surprisals for a reader's who
adapts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.data import Corpus
from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.evaluators.dynamic import coefficients, move, root_mean_squares, window_gradients
from mogrifier_lm.evaluators.task import Task
from mogrifier_lm.model import LanguageModel, States, restored
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.texts.fetch import fetched_corpus
from mogrifier_lm.training import checkpoint

# Where a run has not tuned them. Tuning found learning rates of 4e-4 to 8e-4 and decays of 1e-3 to
# 1e-2 on PTB and WikiText-2 (results/); at 1.6e-3 one of these models diverges.
UNTUNED: dict[str, Any] = {
    "window": 20, "rule": "rms", "mean": "elements", "lr": 4e-4, "decay": 1e-3, "epsilon": 1e-4,
    "statistics_tokens": 100_000, "statistics_batch_size": 20,
}  # fmt: skip
STEPS = 254  # of the logarithms of a tensor's statistics, where they are kept in a byte each


class Adaptation:
    """How the weights of a model move as it reads.

    Args:
        model: whose weights they are.
        settings: those of `UNTUNED`, as `evaluators.Dynamic` documents them.
        rms: of the gradient of each weight on training text; [] with rule "sgd".
    """

    def __init__(
        self, model: LanguageModel, settings: Mapping[str, Any], rms: Sequence[Tensor]
    ) -> None:
        self.model, self.settings, self.rms = model, settings, rms

    @property
    def window(self) -> int:
        """Tokens between updates."""
        return int(self.settings["window"])

    def __str__(self) -> str:
        numbers = (f"{key} {self.settings[key]:g}" for key in ("window", "lr", "decay", "epsilon"))
        tuned = "as tuned" if self.settings["tuned"] else "not tuned for this model"
        return f"{self.settings['rule']}, {', '.join(numbers)}, {tuned}"

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Within, weights move; at the end the trained ones are back."""
        params = list(self.model.parameters())
        self.factors = coefficients(params, self.settings, self.rms)
        with restored(params) as self.trained:
            yield

    def encode(
        self, inputs_T1: Tensor, targets_T1: Tensor, states: States
    ) -> tuple[Tensor, States]:
        """As `model.encode`; `learn` knows what has been read."""
        self.gradients, hidden, states = window_gradients(self.model, inputs_T1, targets_T1, states)
        return hidden, states

    def learn(self) -> None:
        """Move the weights by the gradient of what `encode` was given last."""
        move(list(self.model.parameters()), self.trained, self.gradients, self.factors)

    def save(self, folder: RunFolder, exact: bool) -> None:
        """Write settings and statistics: exact, or a byte a weight, each within a few percent."""
        names, spans, tensors = [n for n, _ in self.model.named_parameters()], {}, {}
        for name, rms in zip(names, self.rms, strict=False):
            if exact:
                tensors[name] = rms
            else:
                tensors[name], spans[name] = _coded(rms)
        checkpoint.save(
            folder.statistics, tensors, {"settings": dict(self.settings), "spans": spans}
        )


def adaptation(folder: RunFolder, model: LanguageModel, corpus: Corpus | None = None) -> Adaptation:
    """Of an exported folder, which holds the statistics, or of a run, whose training text does.

    The settings are those that the run's dynamic evaluation has tuned, else `UNTUNED`.

    Args:
        folder: of the model.
        model: with its trained weights.
        corpus: of a run, where it is at hand.

    Raises:
        UserError: neither statistics nor the training text are found.
    """
    if folder.statistics.is_file():
        tensors, values = checkpoint.load(folder.statistics, str(model.output_bias.device))
        try:
            return _saved(model, tensors, values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{folder.statistics} is damaged: {one_line(error)}") from error
    if not folder.provenance.is_file():
        raise UserError(
            f"{folder} was exported without statistics: adapt=true needs them, or the run itself"
        )
    corpus = corpus or fetched_corpus(folder)
    entry = folder.read_summary().get("test", {}).get("dynamic", {})
    settings = {key: entry.get(key, value) for key, value in UNTUNED.items()}
    settings["tuned"] = bool(entry)
    task = Task(model, corpus.splits, corpus.tokenizer.eos_id)
    rms = root_mean_squares(task, settings) if settings["rule"] == "rms" else []
    return Adaptation(model, settings, rms)


def _saved(
    model: LanguageModel, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> Adaptation:
    """Out of what `Adaptation.save` has written.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it has not.
    """
    spans, settings, rms = values["spans"], values["settings"], []
    settings |= {key: type(value)(settings[key]) for key, value in UNTUNED.items()}
    if not (settings["window"] >= 1 and all(0 <= settings[k] < 1e4 for k in ("lr", "decay"))):
        raise ValueError(f"settings out of range: {settings}")
    for name, p in model.named_parameters() if settings["rule"] == "rms" else ():
        found = tensors[name]
        found = (_decoded(found, *spans[name]) if name in spans else found).to(p.dtype)
        if found.shape != p.shape or not found.isfinite().all():
            raise ValueError(f"{name} is of another model, or holds no numbers")
        rms.append(found)
    return Adaptation(model, settings, rms)


def _coded(rms: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Steps of ln between the least and the largest, from 1, in uint8; 0 is 0."""
    logs = rms.log()
    real = logs[rms > 0]
    low, high = (real.min().item(), real.max().item()) if len(real) else (0.0, 0.0)
    steps = 1 + ((logs - low) * (STEPS / max(high - low, 1e-9))).round().clamp(0, STEPS)
    return torch.where(rms > 0, steps, 0).to(torch.uint8), (low, high)


def _decoded(code: Tensor, low: float, high: float) -> Tensor:
    """What `_coded` was given, within a factor exp((high - low) / 508)."""
    values = (low + (code.float() - 1) * ((high - low) / STEPS)).exp()
    return torch.where(code > 0, values, 0.0)
