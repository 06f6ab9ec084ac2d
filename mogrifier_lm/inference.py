"""A trained model at work: what each token of a text costs it, and text of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import linear

from mogrifier_lm.data import Streams
from mogrifier_lm.model import LanguageModel


def stream_nats(
    model: LanguageModel, ids: np.ndarray, eos_id: int, window: int = 512
) -> np.ndarray:
    """-ln p of each token of a text, [N] float64: the terms of the static score at batch size 1."""
    streams, states = Streams(ids, 1, eos_id), model.zero_states(1)
    device = model.output_bias.device
    parts = []
    for start in range(0, len(ids), window):
        inputs_T1, targets_T1 = streams.window(start, window)
        nats_T1, states = model.token_nats(inputs_T1.to(device), targets_T1.to(device), states)
        parts.append(nats_T1[:, 0].double().cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompt: Sequence[int],
    num_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    seed: int = 1,
) -> list[int]:
    """Ids of tokens drawn one by one after an <eos> and the prompt, the state carried.

    Args:
        model: weights are used as they are.
        prompt: ids, may be empty.
        num_tokens: how many are drawn.
        eos_id: the token fed first.
        temperature: divides the logits, above 0: below 1 likely words become likelier.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    device, states = model.output_bias.device, model.zero_states(1)
    inputs, drawn = [eos_id, *prompt], []
    for _ in range(num_tokens):
        hidden_TH, states = model.encode(torch.tensor(inputs, device=device)[:, None], states)
        logits_V = linear(hidden_TH[-1], model.output_weight, model.output_bias)
        p_V = (logits_V.double().cpu() / temperature).softmax(0)
        inputs = [int(torch.multinomial(p_V, 1, generator=generator))]
        drawn += inputs
    return drawn
