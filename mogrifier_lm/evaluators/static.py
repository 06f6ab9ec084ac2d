"""The static evaluator: trained weights, deterministic, the state carried over the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.evaluators.task import (
    Evaluation,
    Settings,
    Task,
    Tempered,
    Text,
    tune_tokens,
)
from mogrifier_lm.option import LAMB, SIZE, TEMPERATURE, option

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mogrifier_lm.data import Split
    from mogrifier_lm.model import LanguageModel


@dataclass(kw_only=True)
class Static(Tempered):
    """Score every token of a text.

    The state starts at zero, an <eos> is fed before the first token, and the state is carried
    across windows; with a batch size above 1 each stream starts cold at its place in the text.
    """

    batch_size: int = option(1, "streams; 1 carries the state over the whole split", SIZE)
    window: int = option(512, "time steps scored at once; changes speed, not the score", SIZE)
    temperature: list[float] = option(
        [1.0], "divides the logits (published results: 0.94 to 1.25)", TEMPERATURE, LAMB
    )
    tune_tokens: int | None = tune_tokens(None)

    def score_at(
        self, task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
    ) -> list[Evaluation]:
        import torch

        from mogrifier_lm.data import IGNORE
        from mogrifier_lm.evaluators.captured import encode

        model, batch_size = task.model, min(settings["batch_size"], len(text))
        states, num_steps = model.zero_states(batch_size), -(-len(text) // batch_size)
        nats_KTB = model.output_bias.new_empty(len(temperatures), num_steps, batch_size)
        is_token_TB = torch.empty(num_steps, batch_size, dtype=torch.bool, device=nats_KTB.device)
        windows = task.windows(text, settings["window"], "static", batch_size)
        for steps, inputs_TB, targets_TB in windows:
            hidden, states = encode(model, inputs_TB, states)
            for nats_TB, temperature in zip(nats_KTB, temperatures, strict=True):
                nats_N = model.output_nats(hidden, targets_TB.flatten(), temperature)
                nats_TB[steps] = nats_N.view_as(targets_TB)
            is_token_TB[steps] = targets_TB != IGNORE
        return [Evaluation(nats_TB.T[is_token_TB.T].cpu()) for nats_TB in nats_KTB]


def static_nats(
    model: LanguageModel, ids: np.ndarray, eos_id: int, batch_size: int = 1, window: int = 512
) -> Tensor:
    """-ln p of each token of a text [N] at temperature 1; arguments as in `Static`."""
    from mogrifier_lm.data import Split

    settings = {"batch_size": batch_size, "window": window, "temperature": 1.0}
    text = Text("text", Split(ids=ids, words=0, bytes=0, sha256=""))
    return Static().score_at(Task(model, {}, eos_id), text, settings, [1.0])[0].nats


def static_score(model: LanguageModel, split: Split, eos_id: int, batch_size: int) -> Score:
    """The score of a split alone, as `static_nats`."""
    return Text("valid", split).score(static_nats(model, split.ids, eos_id, batch_size, window=64))
