"""Monte Carlo dropout: the mean of many predictions, each under dropout masks of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.task import (
    Evaluation,
    Settings,
    Task,
    Tempered,
    Text,
    tune_tokens,
)
from mogrifier_lm.option import COUNT, LAMB, MOGRIFIER, SEED, SIZE, TEMPERATURE, Interval, option

if TYPE_CHECKING:
    from torch import Tensor

    from mogrifier_lm.model import LanguageModel


@dataclass(kw_only=True)
class MCDropout(Tempered):
    """The arithmetic mean of probabilities over passes with the training's dropout rates, scaled.

    Each pass has masks and a state of its own; the passes are the streams of one batch. The
    geometric mean, normalised over the vocabulary, is reported beside it. (Melis et al., arXiv
    1909.01792; arithmetic with the rates times 0.6 to 0.9.)
    """

    passes: int = option(20, "predictions averaged", COUNT, MOGRIFIER)
    scale: list[float] = option(
        [0.0, 0.1, 0.2, 0.4, 0.6, 0.8],
        "factor on the training's dropout rates",
        Interval(0, 100),
        MOGRIFIER,
    )
    temperature: list[float] = option([1.0], "divides the logits of each pass", TEMPERATURE, LAMB)
    window: int = option(
        "${trainer.bptt}",
        "time steps that share a mask, where the training's masks are shared over time",
        SIZE,
    )
    seed: int = option(0, "of the masks", SEED)
    tune_tokens: int | None = tune_tokens(10_000)

    def check(self, config: Any) -> None:
        rates = (v for k, v in vars(config.regularization).items() if k.endswith("_dropout"))
        scale, rate = max(self.scale), max(rates)
        if rate * scale >= 1:
            raise UserError(
                f"evaluators.mc_dropout.scale is up to {scale:g}, which takes the dropout rate "
                f"{rate:g} to 1 or above"
            )

    def score_at(
        self, task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
    ) -> list[Evaluation]:
        import torch

        from mogrifier_lm.evaluators.captured import encode
        from mogrifier_lm.regularization import SHARED, draw_masks, kind, masked, scaled

        model, passes = task.model, settings["passes"]
        device, size = model.output_bias.device, (len(temperatures), len(text))
        rates = scaled(task.regularization, settings["scale"])
        shared = any(kind(name) in SHARED for name in masked(rates, model.mask_shapes))
        batch_size = 1 if shared else passes  # passes that are to differ run one at a time
        states = [model.zero_states(batch_size) for _ in range(passes // batch_size)]
        generator = torch.Generator(device).manual_seed(settings["seed"])
        arithmetic_KN = torch.empty(size, dtype=torch.float64, device=device)
        geometric_KN = torch.empty(size, device=device)
        for steps, inputs_T1, targets_T1 in task.windows(text, settings["window"], "mc_dropout"):
            shape = len(inputs_T1), batch_size
            inputs_TB, hiddens = inputs_T1.expand(shape).contiguous(), []
            for i, state in enumerate(states):
                masks = draw_masks(rates, model.mask_shapes, shape, generator)
                hidden, states[i] = encode(model, inputs_TB, state, masks)
                hiddens.append(hidden.view(*shape, -1))
            hidden_TPE = torch.cat(hiddens, 1)
            for k, temperature in enumerate(temperatures):
                nats_TP = model.output_nats(
                    hidden_TPE.flatten(0, 1), targets_T1.expand(-1, passes).flatten(), temperature
                ).view(-1, passes)
                arithmetic_KN[k, steps] = math.log(passes) - (-nats_TP.double()).logsumexp(1)
                geometric_KN[k, steps] = _geometric(model, hidden_TPE, targets_T1, temperature)
        return [
            Evaluation(arithmetic_N, {"geometric": geometric_N})
            for arithmetic_N, geometric_N in zip(
                arithmetic_KN.cpu(), geometric_KN.cpu(), strict=True
            )
        ]


def _geometric(
    model: LanguageModel, hidden_TPE: Tensor, targets_T1: Tensor, temperature: float
) -> Tensor:
    """-ln of the normalised geometric mean over the passes P, [T]."""
    if model.mixture == 1:
        # The logits are linear in h: it is softmax(W mean(h)), for the price of one more pass.
        return model.output_nats(hidden_TPE.mean(1), targets_T1.flatten(), temperature)
    log_p = model.log_probs(hidden_TPE.flatten(0, 1), temperature)
    mean_TV = log_p.view(*hidden_TPE.shape[:2], -1).mean(1).log_softmax(1)
    return -mean_TV.gather(1, targets_T1).squeeze(1)
