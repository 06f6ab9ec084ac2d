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
