"""The contract of the evaluators: what they are given, what they return, how they are tuned."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mogrifier_lm.evaluators.score import Score, perplexity
from mogrifier_lm.option import COUNT, option
from mogrifier_lm.options import RegularizationConfig
from mogrifier_lm.terminal import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from mogrifier_lm.data import Split
    from mogrifier_lm.model import LanguageModel

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """A split by its name, or its beginning.

    `with_hidden`: a later evaluator reads the hidden vectors of this evaluation.
    """

    name: str
    split: Split
    with_hidden: bool = False

    def __len__(self) -> int:
        return len(self.split.ids)

    def score(self, nats_N: Tensor) -> Score:
        split, nats = self.split, nats_N.double().sum().item()
        return Score(
            nats=nats,
            tokens=len(self),
            words=split.words,
            bytes=split.bytes,
            characters=split.characters,
        )


@dataclass(frozen=True)
class Evaluation:
    """-ln p of each token in the text's order [N].

    `others`: further variants that were computed on the way, reported beside it. `hidden` [N, E]:
    what the softmax saw, where the text is `with_hidden`.
    """

    nats: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None


@dataclass
class Task:
    """What every evaluator is given, beside the text and its settings.

    Args:
        model: with trained weights, on its device; evaluators leave it as it was.
        splits: "train" (for statistics), "valid" (for tuning) and those to score.
        eos_id: the token fed before a text's first.
        regularization: that the model was trained with.
        needed: evaluators that a later one has among its `needs`.

    Attributes:
        evaluations: theirs, of each split that they have scored: (name, split) → evaluation.
    """

    model: LanguageModel
    splits: Mapping[str, Split]
    eos_id: int
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    needed: Sequence[str] = ()
    evaluations: dict[tuple[str, str], Evaluation] = field(default_factory=dict)
    _found: dict[object, Any] = field(default_factory=dict)

    def once(self, key: object, find: Callable[[], T]) -> T:
        """What `find` finds, looked for once: tuning and scoring share it, and so do evaluators."""
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    def windows(
        self, text: Text, window: int, doing: str, batch_size: int = 1
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The time steps of each window, its inputs and targets [T, B] on the model's device.

        With a progress bar. Results belong in one tensor made before the loop: small ones kept
        from window to window lie between what is freed, and the heap grows by gigabytes.
        """
        from mogrifier_lm.data import Streams
        from mogrifier_lm.kernels.graphs import sent

        streams = Streams(text.split.ids, batch_size, self.eos_id)
        device = self.model.output_bias.device
        starts = range(0, streams.num_steps, window)
        bar = progress_bar(starts, desc=f"{doing}, {text.name}", unit="window", leave=False)
        for start in bar:
            inputs_TB, targets_TB = streams.window(start, window)
            steps = slice(start, start + len(inputs_TB))
            yield steps, sent(inputs_TB, device), sent(targets_TB, device)


@dataclass(kw_only=True)
class Evaluator:
    """An evaluator: its settings, as fields made by `options.option`, and how it scores a text.

    A setting that is a list is tuned, on as much validation text as a field `tune_tokens` says.
    """

    # Evaluators that have to run before this one, which finds theirs in `Task.evaluations`.
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, config: Any) -> None:
        """Look at the settings beside the rest of the config, an `mogrifier_lm.config.Config`.

        Raises:
            UserError: they do not go together.
        """

    def score(self, task: Task, text: Text, trials: Sequence[Settings]) -> Iterable[Evaluation]:
        """Score a text under each of several settings, between which work may be shared.

        Args:
            task: the model and what is known of it.
            text: to be scored, every token of it.
            trials: setting → value, for each field; one of its values where it is a list.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Tempered(Evaluator):
    """One with a setting `temperature`: trials in a row that share all others share a pass."""

    def score(self, task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
        def others(trial: Settings) -> Settings:
            return {key: value for key, value in trial.items() if key != "temperature"}

        for settings, group in itertools.groupby(trials, others):
            yield from self.score_at(task, text, settings, [t["temperature"] for t in group])

    def score_at(
        self, task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
    ) -> Iterable[Evaluation]:
        """An evaluation for each temperature, all else as in `settings`."""
        raise NotImplementedError


def tune_tokens(default: int | None) -> Any:
    """The option of that name."""
    return option(default, "validation tokens tuned on; null: all", COUNT)


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
    name: str, evaluator: Evaluator, task: Task, splits: Sequence[str]
) -> tuple[dict[str, Result], list[dict[str, Any]]]:
    """Tune the settings on the validation text, then score each split once with them.

    Every combination of the listed values is tried on the first `tune_tokens` validation tokens.

    Args:
        name: of the evaluator.
        evaluator: with its settings.
        task: model and texts.
        splits: those to score.

    Returns:
        split → result, and the trials of the search, each with its settings and validation nats
        per token.
    """
    values = dict(vars(evaluator))
    tune_tokens = values.pop("tune_tokens", None)
    grid = {k: v for k, v in values.items() if isinstance(v, list)}
    settings = [
        values | dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())
    ]
    best, others, trials = settings[0], list[dict[str, Any]](), []
    if len(settings) > 1:
        valid = task.splits["valid"]
        part = Text("valid", replace(valid, ids=valid.ids[:tune_tokens]))
        began = time.monotonic()
        for tried, evaluation in zip(settings, evaluator.score(task, part, settings), strict=True):
            nats = evaluation.nats.double().mean().item()
            trials.append({**{k: tried[k] for k in grid}, "valid_nats": nats})
            log.debug("%s: %s", name, trials[-1])
        ppls = [perplexity(trial["valid_nats"]) for trial in trials]
        order = sorted(range(len(settings)), key=ppls.__getitem__)
        best, index = settings[order[0]], order[0]
        others = [settings[i] for i in order[1:] if ppls[i] < math.inf]
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
    results, left = {}, list(splits)
    while left:
        split, began = left[0], time.monotonic()
        text = Text(split, task.splits[split], with_hidden=name in task.needed)
        (evaluation,) = evaluator.score(task, text, [best])
        if text.with_hidden:
            task.evaluations[name, split] = evaluation
        results[split] = Result(text.score(evaluation.nats), best, evaluation, text)
        seconds = time.monotonic() - began
        log.info("%s: %s %s, %.0f s", name, split, results[split].score, seconds)
        finite = math.isfinite(results[split].score.ppl)
        if not finite:
            log.warning("%s: the perplexity of %s is not finite with these settings", name, split)
        if not finite and split == "valid" and others:  # well at the text's beginning, not for long
            best = others.pop(0)
            log.warning("%s: the next best are taken, %s", name, {k: best[k] for k in grid})
        else:
            left = left[1:]
    return results, trials


def check_causality(model: LanguageModel, split: Split, eos_id: int, length: int = 32) -> None:
    """Change the later words of a text's beginning: no earlier prediction may move.

    Raises:
        ValueError: a model that sees the future.
    """
    import torch

    from mogrifier_lm.data import Streams

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
