"""Monte Carlo dropout: the mean of many predictions, each under dropout masks of its own."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mogrifier_lm.evaluators.captured import encode
from mogrifier_lm.evaluators.task import Evaluation, Settings, Task, Text, by_temperature
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.regularization import SHARED, draw_masks, kind, masked, scaled


def mc_dropout(task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
    """The arithmetic mean of probabilities over passes with the training's dropout rates, scaled.

    Each pass has masks and a state of its own; the passes are the streams of one batch. The
    geometric mean, normalised over the vocabulary, is reported beside it. (Melis et al., arXiv
    1909.01792; arithmetic with the rates times 0.6 to 0.9.)

    Settings:
        passes: how many.
        scale: factor on the rates.
        temperature: factor on the logits of each pass.
        window: time steps that share a mask, where the training's masks are shared over time.
        seed: of the masks.
    """
    for settings, temperatures in by_temperature(trials):
        yield from _average(task, text, settings, temperatures)


@torch.no_grad()
def _average(
    task: Task, text: Text, settings: Settings, temperatures: Sequence[float]
) -> list[Evaluation]:
    model, passes = task.model, settings["passes"]
    rates = scaled(task.regularization, settings["scale"])
    shared = any(kind(name) in SHARED for name in masked(rates, model.mask_shapes))
    batch_size = 1 if shared else passes  # passes that are to differ run one at a time
    states = [model.zero_states(batch_size) for _ in range(passes // batch_size)]
    generator = torch.Generator(model.output_bias.device).manual_seed(settings["seed"])
    arithmetic: list[list[Tensor]] = [[] for _ in temperatures]
    geometric: list[list[Tensor]] = [[] for _ in temperatures]
    for inputs_T1, targets_T1 in task.windows(text, settings["window"], "mc_dropout"):
        shape = len(inputs_T1), batch_size
        inputs_TB, hiddens = inputs_T1.expand(shape).contiguous(), []
        for i, state in enumerate(states):
            masks = draw_masks(rates, model.mask_shapes, shape, generator)
            hidden, states[i] = encode(model, inputs_TB, state, masks)
            hiddens.append(hidden.view(*shape, -1))
        hidden_TPE = torch.cat(hiddens, 1)
        for i, temperature in enumerate(temperatures):
            nats_TP = model.output_nats(
                hidden_TPE.flatten(0, 1), targets_T1.expand(-1, passes).flatten(), temperature
            ).view(-1, passes)
            arithmetic[i].append(math.log(passes) - (-nats_TP.double()).logsumexp(1))
            geometric[i].append(_geometric(model, hidden_TPE, targets_T1, temperature))
    return [
        Evaluation(torch.cat(a).cpu(), {"geometric": torch.cat(g).cpu()})
        for a, g in zip(arithmetic, geometric, strict=True)
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
