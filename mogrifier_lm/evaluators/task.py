"""The contract of the evaluators: what they are given, what they return, how they are tuned."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.data import Split, Streams
from mogrifier_lm.evaluators.score import Score, perplexity
from mogrifier_lm.kernels.graphs import sent
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import RegularizationConfig
from mogrifier_lm.terminal import progress_bar

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A split by its name, or its beginning."""

    name: str
    split: Split

    def __len__(self) -> int:
        return len(self.split.ids)

    def score(self, nats_N: Tensor) -> Score:
        split, nats = self.split, nats_N.double().sum().item()
        return Score(nats=nats, tokens=len(self), words=split.words, bytes=split.bytes)


@dataclass
class Task:
    """What every evaluator is given, beside the text and its settings.

    Args:
        model: with trained weights, on its device; evaluators leave it as it was.
        splits: "train" (for statistics), "valid" (for tuning) and those to score.
        eos_id: the token fed before a text's first.
        regularization: that the model was trained with.
        keep: evaluators whose hidden vectors a later one reads: they leave them in `memo`.
        memo: what evaluators share, and what tuning and scoring share.
    """

    model: LanguageModel
    splits: Mapping[str, Split]
    eos_id: int
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    keep: Sequence[str] = ()
    memo: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def windows(
        self, text: Text, window: int, doing: str, batch_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [T, B] of each window on the model's device, with a progress bar."""
        streams = Streams(text.split.ids, batch_size, self.eos_id)
        device = self.model.output_bias.device
        starts = range(0, streams.num_steps, window)
        bar = progress_bar(starts, desc=f"{doing}, {text.name}", unit="window", leave=False)
        for start in bar:
            inputs_TB, targets_TB = streams.window(start, window)
            yield sent(inputs_TB, device), sent(targets_TB, device)


@dataclass(frozen=True)
class Evaluation:
    """-ln p of each token in the text's order [N]; `others` are further variants that were
    computed on the way, reported beside it."""

    nats: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)


# Scores a text under each of several settings; it may share work between them.
Evaluator = Callable[[Task, Text, Sequence[Settings]], Iterable[Evaluation]]


def by_temperature(trials: Iterable[Settings]) -> Iterator[tuple[Settings, list[float]]]:
    """Settings and their temperatures: trials in a row that differ in nothing else share a pass."""

    def others(trial: Settings) -> Settings:
        return {key: value for key, value in trial.items() if key != "temperature"}

    for settings, group in itertools.groupby(trials, others):
        yield settings, [trial["temperature"] for trial in group]


@dataclass(frozen=True)
class Result:
    """A split's score with the settings it was scored with."""

    score: Score
    settings: Settings
    evaluation: Evaluation
    text: Text

    def to_dict(self) -> dict[str, Any]:
        """The entry of summary.json."""
        others = {
            f"{k}_ppl": self.text.score(nats).ppl for k, nats in self.evaluation.others.items()
        }
        return {**self.score.to_dict(), **self.settings, **others}


def evaluate(
    name: str, evaluator: Evaluator, config: Any, task: Task, splits: Sequence[str]
) -> tuple[dict[str, Result], list[dict[str, Any]]]:
    """Tune the settings on the validation text, then score each split once with them.

    A setting that is a list is tuned: every combination of the listed values is tried on the first
    `config.tune_tokens` validation tokens (None: all).

    Args:
        name: of the evaluator, for the log.
        evaluator: a function of `EVALUATORS`.
        config: its settings.
        task: model and texts.
        splits: those to score.

    Returns:
        split → result, and the trials of the search, each with its settings and validation nats
        per token.
    """
    values = {k: v for k, v in vars(config).items() if k != "tune_tokens"}
    grid = {k: v for k, v in values.items() if isinstance(v, list)}
    settings = [
        values | dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())
    ]
    best, trials = settings[0], []
    if len(settings) > 1:
        valid = task.splits["valid"]
        part = Text("valid", replace(valid, ids=valid.ids[: config.tune_tokens]))
        began = time.monotonic()
        for tried, evaluation in zip(settings, evaluator(task, part, settings), strict=True):
            nats = evaluation.nats.double().mean().item()
            trials.append({**{k: tried[k] for k in grid}, "valid_nats": nats})
            log.debug("%s: %s", name, trials[-1])
        ppls = [perplexity(trial["valid_nats"]) for trial in trials]
        index = ppls.index(min(ppls))
        best = settings[index]
        if ppls[index] == math.inf:
            log.warning("%s: every setting tried gives infinite nats; the first is taken", name)
        log.info(
            "%s: %s, the best of %d settings on %s validation tokens, perplexity %.2f, %.0f s",
            name,
            ", ".join(f"{k} {best[k]:g}" for k, v in grid.items() if len(v) > 1),
            len(trials),
            f"{len(part):,}",
            ppls[index],
            time.monotonic() - began,
        )
    results = {}
    for split in splits:
        began = time.monotonic()
        text = Text(split, task.splits[split])
        (evaluation,) = evaluator(task, text, [best])
        results[split] = Result(text.score(evaluation.nats), best, evaluation, text)
        seconds = time.monotonic() - began
        log.info("%s: %s perplexity %.2f, %.0f s", name, split, results[split].score.ppl, seconds)
    return results, trials


def check_causality(model: LanguageModel, split: Split, eos_id: int, length: int = 32) -> None:
    """Change the later words of a text's beginning: no earlier prediction may move.

    Raises:
        ValueError: a model that sees the future.
    """
    inputs_T1, targets_T1 = Streams(split.ids, 1, eos_id).window(0, length)
    half = len(inputs_T1) // 2
    device = model.output_bias.device
    changed_T1 = inputs_T1.clone()
    changed_T1[half:] = (changed_T1[half:] + 1) % model.vocab_size
    before, after = (
        model.token_nats(x.to(device), targets_T1.to(device), model.zero_states(1))[0][:half]
        for x in (inputs_T1, changed_T1)
    )
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"the model sees the future: a change of word {half} moved an earlier prediction by "
            f"{(before - after).abs().max():.2g} nats, so its perplexity means nothing"
        )
