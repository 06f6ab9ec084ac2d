"""What the rounds do: the gates by which x and h scale each other, word by word."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mogrifier_lm.cells import RecurrentLayer
from mogrifier_lm.data import Tokenizer
from mogrifier_lm.kernels.recurrence.reference import gate
from mogrifier_lm.model import LanguageModel


@dataclass(frozen=True)
class Gates:
    """The gates of a text; T words (tokens, with pieces), <eos> fed before the first.

    words: [T] what each step reads.
    layers: for each layer its rounds, round 1 first, each [T, features] float32: 2 sigmoid, the
        factor on x in odd rounds and on h in even ones; 1 leaves it as it is.
    inputs: for each layer the x [T, input size] and the h [T, hidden size] that enter its first
        rounds; each later one is the one before times the gate of its round.
    zigzag: a gate is computed from the other one as the round before has left it, not from its
        original.
    """

    words: list[str]
    layers: list[list[np.ndarray]]
    inputs: list[tuple[np.ndarray, np.ndarray]]
    zigzag: bool

    def moved(self) -> np.ndarray:
        """[layers, rounds, T]: how far a gate is from leaving things as they are, as the root mean
        square of ln(gate) over its features."""
        return np.array(
            [[np.sqrt(np.square(np.log(g)).mean(1)) for g in rounds] for rounds in self.layers]
        )


@torch.no_grad()
def gates(model: LanguageModel, tokenizer: Tokenizer, line: str) -> Gates:
    """The gates while the model reads an <eos> and the words of a line.

    The layers run as they do in scoring; a gate is found again from the x and h of its step.
    """
    ids = [tokenizer.eos_id, *tokenizer.encode([line])[:-1].tolist()]
    layers, inputs = [], []
    states, device = model.zero_states(1), model.output_bias.device
    x = model.embed(torch.tensor(ids, device=device)[:, None])
    for layer, state in zip(cast(list[RecurrentLayer], list(model.layers)), states, strict=True):
        output, _ = layer(x, state)
        weights, zigzag = layer.weights(), layer.spec.options.zigzag
        before = torch.cat([state[0][None], output[:-1]])  # the h that enters each step
        x_t = x0 = x.flatten(0, 1)
        h_t = h0 = before.flatten(0, 1)
        own = []
        for i, r in enumerate(weights.rounds, start=1):
            if i % 2:
                own.append(gate(h_t if zigzag else h0, r))
                x_t = own[-1] * x_t
            else:
                own.append(gate(x_t if zigzag else x0, r))
                h_t = own[-1] * h_t
        layers.append([_array(g) for g in own])
        inputs.append((_array(x0), _array(h0)))
        x = x + output if model.residual else output
    return Gates([tokenizer.vocabulary[i] for i in ids], layers, inputs, zigzag)


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.float().cpu().numpy()
    return found
