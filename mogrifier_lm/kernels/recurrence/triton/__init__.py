"""The recurrences in Triton for CUDA devices: a few fused kernels a step.

`kernels` and `rlstm` are these, `layer` puts them behind each other, `wavefront` runs layers side
by side. With TRITON_INTERPRET=1 Triton's interpreter runs them on a CPU, rightly in float32 alone.
"""

from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.kernels import triton
from mogrifier_lm.kernels.recurrence.reference import Options, Weights

CELLS = ("lstm", "mlstm", "rlstm")


def unsupported(cell: str, device: str | torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run such a layer here, in one line; None where it can."""
    reason = triton.unsupported(device, dtype)
    return reason if cell in CELLS else f"the triton backend has no {cell} cell"


def recurrence(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.recurrence`, which documents the arguments; `state_mask` has no gradient.

    Raises:
        ValueError: a cell, device or dtype that this backend does not have.
    """
    if reason := unsupported(options.cell, x.device, weights.hh.dtype):
        raise ValueError(reason)
    (output,), ((h, c),) = stack(x, [(h, c)], [weights], options, [state_mask], [])
    return output, h, c


def stack(*arguments: Any) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """See `wavefront.stack`; Triton is imported when it is first called."""
    from mogrifier_lm.kernels.recurrence.triton import wavefront

    return wavefront.stack(*arguments)
