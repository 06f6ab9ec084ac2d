"""The static evaluator: trained weights, deterministic, the state carried over the split."""

import torch

from mogrifier_lm.config import StaticConfig
from mogrifier_lm.data import Split, Streams
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.model import LanguageModel


def static(model: LanguageModel, split: Split, eos_id: int, config: StaticConfig) -> Score:
    """Score every token of a split.

    The state starts at zero, an <eos> is fed before the first token, and the state is carried
    across windows; with a batch size above 1 each stream starts cold at its place in the text.

    Args:
        model: weights are used as they are, without dropout.
        split: the text.
        eos_id: the token fed first.
        config: streams, and time steps scored at once.
    """
    streams = Streams(split.ids, config.batch_size, eos_id)
    device = model.output_bias.device
    states = model.zero_states(config.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, streams.num_steps, config.window):
        inputs_TB, targets_TB = streams.window(start, config.window)
        nats_TB, states = model.token_nats(inputs_TB.to(device), targets_TB.to(device), states)
        total += nats_TB.double().sum()
    return Score(nats=total.item(), tokens=streams.num_tokens, words=split.words, bytes=split.bytes)
