"""Recurrences over time: the reference and its fast siblings, one signature."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.kernels.choice import choose
from mogrifier_lm.kernels.recurrence import fused, native, operators, reference, triton
from mogrifier_lm.kernels.recurrence.reference import Options, Round, State, Step, Weights

__all__ = ["BACKENDS", "STACKS", "Options", "Round", "State", "Step", "Weights", "resolve", "run"]

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.recurrence,
    "fused": fused.recurrence,
    "native": native.recurrence,
    "triton": triton.recurrence,
}

operators.EAGER.update(fused=fused.recurrence, native=native.recurrence)

# Backends that run layers on each other at once: (x, states, weights, options, state_masks, masks
# between layers) -> outputs, states; see `triton.wavefront.stack`.
STACKS: dict[str, Callable[..., Any]] = {"triton": triton.stack}


def resolve(
    backend: str,
    device: str | torch.device,
    *,
    cell: str = "lstm",
    dtype: torch.dtype = torch.float32,
) -> str:
    """The name of the backend that runs: `auto` is the fastest one for such a layer on `device`.

    Args:
        backend: "auto" or a key of `BACKENDS`.
        device: of the parameters, as torch.device takes it.
        cell: its name.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown backend, or one that cannot run here, with the reason.
    """
    if cell not in fused.CELLS:  # a new one has its definition first
        if backend in ("auto", "reference"):
            return "reference"
        raise ValueError(f"backend is {backend}: it has no {cell} cell, reference runs any")
    unsupported = {
        "native": lambda: native.unsupported(cell, device, dtype),
        "triton": lambda: triton.unsupported(cell, device, dtype),
    }
    return choose(backend, device, ("reference", "fused"), unsupported, "the recurrence")


def run(
    backend: str,
    x: Tensor,
    state: State,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`reference.unroll`, which documents the arguments, by the backend of this name."""
    if backend == "reference":
        return reference.unroll(x, state, weights, options, state_mask)
    h, c = state
    output, h, c = BACKENDS[backend](x, h, c, weights, options, state_mask)
    return output, (h, c)
