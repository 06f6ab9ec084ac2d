"""The recurrence, one line per equation: the definition every faster kernel is tested against.

A cell's own equations are in its file in cells/; the loop takes them as an argument.

Shape legend: T time steps, B streams, I input size, H hidden size, k rank.
Source: Mogrifier LSTM (Melis et al., arXiv 1909.01792, eq. 1-2).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""What a step hands to the next, [B, H] each: (h, c) of an LSTM; the first is the output."""


class Round(NamedTuple):
    """One round: gate = 2 sigmoid(source @ W.T + bias), W = weight, or left @ right.

    `weight` is [target, source] at full rank, else the left factor [target, k]; `right` is
    [k, source] or None; `bias` is [target] or None. Odd rounds gate x by h, even rounds h by x.
    """

    weight: Tensor
    right: Tensor | None = None
    bias: Tensor | None = None


class Weights(NamedTuple):
    """The weights of one layer, shaped as its cell's file says.

    `ih` and `hh` are those of x and h, `bias` the cell's or None, `more` its further weights by
    name, in the order of the cell's shapes. `rounds`: round 1 first; the same tensor may stand in
    several rounds (shared matrices).
    """

    ih: Tensor
    hh: Tensor
    bias: Tensor | None = None
    rounds: tuple[Round, ...] = ()
    more: Mapping[str, Tensor] = MappingProxyType({})


class Options(NamedTuple):
    """What a layer fixes besides its weights.

    `step` is the cell's, which the reference runs, and `cell` its name, by which other kernels know
    it. `zigzag`: False conditions every round on the original x and h. `cap_input_gate`: an input
    gate is at most 1 - f.
    """

    step: "Step"
    cell: str = "lstm"
    zigzag: bool = True
    cap_input_gate: bool = False


Step = Callable[[Tensor, State, Weights, Options, Tensor | None], State]
"""(x [B, I], state, weights, options, mask [B, H] or None) → the next state.

x and the state's h have been masked and mogrified; the mask is for cells that use it once more.
"""


def gate(source: Tensor, r: Round) -> Tensor:
    """2 sigmoid(W source + b): near 1 at initialisation."""
    if r.right is not None:
        source = linear(source, r.right)
    return 2 * torch.sigmoid(linear(source, r.weight, r.bias))


def mogrify(
    x: Tensor, h: Tensor, rounds: Sequence[Round], zigzag: bool = True
) -> tuple[Tensor, Tensor]:
    """Let x [B, I] and h [B, H] gate each other in turn; without zigzag by their originals."""
    x0, h0 = x, h
    for i, r in enumerate(rounds, start=1):
        if i % 2:
            x = gate(h if zigzag else h0, r) * x
        else:
            h = gate(x if zigzag else x0, r) * h
    return x, h


def unroll(
    x: Tensor,
    state: State,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run one layer of any cell over time.

    Args:
        x: [T, B, I].
        state: before the first step.
        weights: see `Weights`.
        options: see `Options`.
        state_mask: [1, B, H] or [T, B, H], dropout mask (already scaled by 1 / (1 - rate)) on the
            h that enters each step, before mogrification; the rest of the state is never dropped.

    Returns:
        output [T, B, H] and the state after the last step; output[-1] is its h, neither masked.

    Raises:
        RuntimeError: under torch.jit.trace, which would fix the number of steps without a word.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace would fix the number of steps of the reference backend: trace another "
            "one, or use torch.export"
        )
    outputs = []
    for t in range(x.shape[0]):
        mask = None if state_mask is None else state_mask[min(t, state_mask.shape[0] - 1)]
        h, *others = state
        x_t, h = mogrify(x[t], h if mask is None else h * mask, weights.rounds, options.zigzag)
        state = options.step(x_t, (h, *others), weights, options, mask)
        outputs.append(state[0])
    return torch.stack(outputs), state


def recurrence(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`unroll` for cells whose state is (h, c), with the signature of its fast siblings.

    Returns:
        output [T, B, H], h [B, H], c [B, H].
    """
    output, (h, c) = unroll(x, (h, c), weights, options, state_mask)
    return output, h, c
