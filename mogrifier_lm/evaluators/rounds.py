"""How much each learned round carries: one trained model with its rounds cut at test time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from mogrifier_lm.evaluators.static import Static
from mogrifier_lm.evaluators.task import Evaluation, Evaluator, Settings, Task, Text
from mogrifier_lm.option import SIZE, option

if TYPE_CHECKING:
    from mogrifier_lm.cells import RecurrentLayer


@dataclass(kw_only=True)
class Rounds(Evaluator):
    """Static scores with the first 0, 1, ... rounds of every layer; the last is the whole model."""

    window: int = option(512, "time steps scored at once; changes speed, not the score", SIZE)

    def score(self, task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
        layers = cast("list[RecurrentLayer]", list(task.model.layers))
        for trial in trials:
            settings = {"batch_size": 1, "temperature": 1.0, **trial}
            evaluations: list[Evaluation] = []
            for r in range(max(layer.spec.rounds for layer in layers) + 1):
                with cut(layers, r):
                    evaluations += Static().score(task, text, [settings])
            others = {f"rounds_{r}": e.nats for r, e in enumerate(evaluations)}
            yield Evaluation(evaluations[-1].nats, others)


@contextmanager
def cut(layers: Sequence[RecurrentLayer], rounds: int) -> Iterator[None]:
    """The layers with their first `rounds` rounds only, within the block."""
    specs = [layer.spec for layer in layers]
    try:
        for layer, spec in zip(layers, specs, strict=True):
            layer.spec = replace(spec, rounds=min(rounds, spec.rounds))
        yield
    finally:
        for layer, spec in zip(layers, specs, strict=True):
            layer.spec = spec
