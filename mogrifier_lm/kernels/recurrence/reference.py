"""The recurrences, one line per equation: the definition every faster kernel is tested against.

Shape legend: T time steps, B streams, I input size, H hidden size, k rank.
Sources: Mogrifier LSTM (Melis et al., arXiv 1909.01792, eq. 1-2); capped input gate (its released
code); mLSTM (Krause et al., arXiv 1609.07959); RLSTM (Melis, arXiv 2211.01848).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Round(NamedTuple):
    """One round: gate = 2 sigmoid(source @ W.T + bias), W = weight, or left @ right.

    `weight` is [target, source] at full rank, else the left factor [target, k]; `right` is
    [k, source] or None; `bias` is [target] or None. Odd rounds gate x by h, even rounds h by x.
    """

    weight: Tensor
    right: Tensor | None = None
    bias: Tensor | None = None


class Weights(NamedTuple):
    """The weights of one layer; gates are stacked in the order i, f, g, o as in torch.nn.LSTM.

    LSTM, mLSTM: `ih` [4H, I], `hh` [4H, H]. RLSTM: `ih` [2H, I] for i, g and `hh` [3H, H] for
    i, f, g, with `fu` [H, H] (i * g into f) and `oc` [H, H] (c' into o). mLSTM: `mx` [H, I],
    `mh` [H, H]. `bias` [4H] or None. `rounds`: round 1 first; the same tensor may stand in
    several rounds (shared matrices).
    """

    ih: Tensor
    hh: Tensor
    bias: Tensor | None = None
    rounds: tuple[Round, ...] = ()
    mx: Tensor | None = None
    mh: Tensor | None = None
    fu: Tensor | None = None
    oc: Tensor | None = None


class Options(NamedTuple):
    """What a layer fixes besides its weights.

    `cell`: "lstm", "mlstm" or "rlstm"; the mogrification stands in front of any of them.
    `zigzag`: False conditions every round on the original x and h. `cap_input_gate`: see
    `lstm_step`.
    """

    cell: str = "lstm"
    zigzag: bool = True
    cap_input_gate: bool = False


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


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, w: Weights, cap_input_gate: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """c' = f c + i g, h' = o tanh(c'); with the cap, i is at most 1 - f, so that |c| <= 1."""
    i, f, g, o = (linear(x, w.ih, w.bias) + linear(h, w.hh)).chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + (torch.minimum(i, 1 - f) if cap_input_gate else i) * g
    return o * torch.tanh(c), c


def mlstm_step(
    x: Tensor, h: Tensor, c: Tensor, w: Weights, cap_input_gate: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An LSTM step whose hidden input is m = (W_mx x)(W_mh h)."""
    assert w.mx is not None and w.mh is not None
    return lstm_step(x, linear(x, w.mx) * linear(h, w.mh), c, w, cap_input_gate, mask)


def rlstm_step(
    x: Tensor, h: Tensor, c: Tensor, w: Weights, cap_input_gate: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rewired LSTM: f sees the update i * g in place of x, o sees the masked c' alone.

    The input gate is always capped at 1 - f.
    """
    assert w.fu is not None and w.oc is not None
    ix, gx = linear(x, w.ih).chunk(2, dim=1)
    ih, fh, gh = linear(h, w.hh).chunk(3, dim=1)
    bi, bf, bg, bo = (0, 0, 0, 0) if w.bias is None else w.bias.chunk(4)
    i, g = torch.sigmoid(ix + ih + bi), torch.tanh(gx + gh + bg)
    f = torch.sigmoid(linear(i * g, w.fu) + fh + bf)
    c = f * c + torch.minimum(i, 1 - f) * g
    o = torch.sigmoid(linear(c if mask is None else c * mask, w.oc) + bo)
    return o * torch.tanh(c), c


STEPS = {"lstm": lstm_step, "mlstm": mlstm_step, "rlstm": rlstm_step}


def recurrence(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer over time.

    Args:
        x: [T, B, I].
        h: [B, H], the hidden state before the first step.
        c: [B, H], the cell state before the first step.
        weights: see `Weights`.
        options: see `Options`.
        state_mask: [1, B, H] or [T, B, H], dropout mask (already scaled by 1 / (1 - rate)) on the
            h that enters each step, before mogrification; c is never dropped.

    Returns:
        output [T, B, H], h [B, H], c [B, H]; output[-1] is h, neither of them masked.
    """
    outputs = []
    for t in range(x.shape[0]):
        mask = None if state_mask is None else state_mask[min(t, state_mask.shape[0] - 1)]
        x_t, h = mogrify(x[t], h if mask is None else h * mask, weights.rounds, options.zigzag)
        h, c = STEPS[options.cell](x_t, h, c, weights, options.cap_input_gate, mask)
        outputs.append(h)
    return torch.stack(outputs), h, c
