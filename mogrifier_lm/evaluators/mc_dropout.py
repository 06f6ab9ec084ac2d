"""Monte Carlo dropout: the mean of many predictions, each under dropout masks of its own."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mogrifier_lm.evaluators.task import Evaluation, Settings, Task, Text
from mogrifier_lm.regularization import Rates, draw_masks

# Masks that the streams of a batch share: passes that are to differ run one at a time.
SHARED = ("embedding", "weight")


def mc_dropout(task: Task, text: Text, trials: Sequence[Settings]) -> Iterator[Evaluation]:
    """The arithmetic mean of probabilities over passes with the training's dropout rates, scaled.

    Each pass has masks and a state of its own; the passes are the streams of one batch. The
    geometric mean, normalised over the vocabulary, is reported beside it. (Melis et al., arXiv
    1909.01792; arithmetic with the rates times 0.6 to 0.9.)

    Settings:
        passes: how many.
        scale: factor on the rates.
        window: time steps that share a mask, where the training's masks are shared over time.
        seed: of the masks.
    """
    for trial in trials:
        yield _average(task, text, trial, task.rates.scaled(trial["scale"]))


@torch.no_grad()
def _average(task: Task, text: Text, settings: Settings, rates: Rates) -> Evaluation:
    model, passes = task.model, settings["passes"]
    batch_size = 1 if any(vars(rates).get(name) for name in SHARED) else passes
    states = [model.zero_states(batch_size) for _ in range(passes // batch_size)]
    generator = torch.Generator(model.output_bias.device).manual_seed(settings["seed"])
    arithmetic: list[Tensor] = []
    geometric: list[Tensor] = []
    for inputs_T1, targets_T1 in task.windows(text, settings["window"], "mc_dropout"):
        shape = len(inputs_T1), batch_size
        inputs_TB, targets_TB = inputs_T1.expand(shape), targets_T1.expand(shape)
        nats, hiddens = [], []
        for i, state in enumerate(states):
            masks = draw_masks(rates, model.mask_sizes, shape, generator)
            hidden, states[i] = model.encode(inputs_TB.contiguous(), state, masks)
            nats.append(model.output_nats(hidden, targets_TB.flatten()).view(shape))
            hiddens.append(hidden.view(*shape, -1))
        log_p_TB = -torch.cat(nats, 1).double()
        arithmetic.append(math.log(passes) - log_p_TB.logsumexp(1))
        hidden_TPE = torch.cat(hiddens, 1)
        if model.mixture == 1:
            # The logits are linear in h: softmax(W mean(h)) is the normalised geometric mean of the
            # passes' softmax(W h), for the price of one more pass.
            geometric.append(model.output_nats(hidden_TPE.mean(1), targets_T1.flatten()))
        else:
            log_p_TPV = model.log_probs(hidden_TPE.flatten(0, 1)).view(*hidden_TPE.shape[:2], -1)
            mean_TV = log_p_TPV.mean(1).log_softmax(1)
            geometric.append(-mean_TV.gather(1, targets_T1).squeeze(1))
    return Evaluation(torch.cat(arithmetic).cpu(), {"geometric": torch.cat(geometric).cpu()})
