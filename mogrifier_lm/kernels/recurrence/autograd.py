"""What the autograd functions of the fast backends share."""

from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.kernels.recurrence import reference
from mogrifier_lm.kernels.recurrence.reference import Options, Round, Weights

# The cells that fast backends know, with the names of their weights beside ih, hh and bias.
MORE: dict[str, tuple[str, ...]] = {
    "lstm": (),
    "mlstm": ("weight_mx", "weight_mh"),
    "rlstm": ("weight_fu", "weight_oc"),
}


def flatten(w: Weights) -> tuple[Tensor | None, ...]:
    """The weights as arguments of an autograd function, which sees no tensors inside tuples."""
    return w.ih, w.hh, w.bias, *w.more.values(), *(tensor for r in w.rounds for tensor in r)


def unflatten(flat: tuple[Any, ...], cell: str) -> Weights:
    ih, hh, bias, *rest = flat
    more, rest = dict(zip(MORE[cell], rest, strict=False)), rest[len(MORE[cell]) :]
    rounds = tuple(Round(*rest[i : i + 3]) for i in range(0, len(rest), 3))
    return Weights(ih, hh, bias, rounds, more)


def twice_differentiable(
    options: Options,
    product: torch.dtype,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    flat: tuple[Tensor | None, ...],
    d_outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h, c and of each of `flat` that can be differentiated: the reference's."""
    wanted = [p for p in (*inputs, *flat) if p is not None and p.requires_grad]
    weights, dtype = unflatten(flat, options.cell), inputs[0].dtype
    narrow = product != dtype
    with torch.autocast(inputs[0].device.type, product if narrow else None, enabled=narrow):
        outputs = reference.recurrence(*inputs, weights, options, mask)
    found = iter(
        torch.autograd.grad(
            outputs, wanted, d_outputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    return tuple(
        next(found) if p is not None and p.requires_grad else None for p in (*inputs, *flat)
    )


def gradients(rows: Tensor, source: Tensor, product: torch.dtype) -> Tensor:
    """Weight gradient [n, m] out of d [T, B, n] and source [T, B, m]: one product over T * B."""
    d, s = rows.flatten(0, 1), source.flatten(0, 1)
    return (d.to(product).t() @ s.to(product)).to(rows.dtype)


def before(first: Tensor, states_TBH: Tensor) -> Tensor:
    """The state that enters each step [T, B, H], out of the first one and those that left."""
    return torch.cat((first.unsqueeze(0), states_TBH[:-1]))


def capped_share(i: Tensor, f: Tensor, capped: bool) -> Tensor | float:
    """What of the gradient of min(i, 1 - f) goes to i: half at ties, as torch.minimum's."""
    if not capped:
        return 1.0
    rest = 1 - f
    return (i < rest).to(i.dtype).add_(i == rest, alpha=0.5)
