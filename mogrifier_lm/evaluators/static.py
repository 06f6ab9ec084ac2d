"""The static evaluator: trained weights, deterministic, the state carried over the text."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mogrifier_lm.data import IGNORE, Split
from mogrifier_lm.evaluators.captured import encode
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.evaluators.task import Evaluation, Settings, Task, Text, by_temperature
from mogrifier_lm.model import LanguageModel


def static(task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
    """Score every token of a text.

    The state starts at zero, an <eos> is fed before the first token, and the state is carried
    across windows; with a batch size above 1 each stream starts cold at its place in the text.

    Settings:
        batch_size: streams, at most one a token.
        window: time steps scored at once.
        temperature: factor on the logits.
    """
    for settings, temperatures in by_temperature(trials):
        yield from _score(task, text, settings, temperatures)


def _score(
    task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
) -> list[Evaluation]:
    batch_size, window = min(settings["batch_size"], len(text)), settings["window"]
    states, targets = task.model.zero_states(batch_size), []
    nats: list[list[Tensor]] = [[] for _ in temperatures]
    for inputs_TB, targets_TB in task.windows(text, window, "static", batch_size):
        hidden, states = encode(task.model, inputs_TB, states)
        for found, temperature in zip(nats, temperatures, strict=True):
            nats_N = task.model.output_nats(hidden, targets_TB.flatten(), temperature)
            found.append(nats_N.view_as(targets_TB))
        targets.append(targets_TB)
    is_token_BT = torch.cat(targets).T != IGNORE
    return [Evaluation(torch.cat(found).T[is_token_BT].cpu()) for found in nats]


def static_nats(
    model: LanguageModel, ids: np.ndarray, eos_id: int, batch_size: int = 1, window: int = 512
) -> Tensor:
    """-ln p of each token of a text [N], without a tuned temperature; arguments as in `static`."""
    settings = {"batch_size": batch_size, "window": window, "temperature": 1.0}
    text = Text("text", Split(ids=ids, words=0, bytes=0, sha256=""))
    (evaluation,) = static(Task(model, {}, eos_id), text, [settings])
    return evaluation.nats


def static_score(model: LanguageModel, split: Split, eos_id: int, batch_size: int) -> Score:
    """The score of a split alone, as `static_nats`."""
    return Text("valid", split).score(static_nats(model, split.ids, eos_id, batch_size, window=64))
