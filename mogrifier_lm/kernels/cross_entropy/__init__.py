"""Linear layer and cross-entropy in one: the reference and its fast siblings, one signature."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mogrifier_lm.kernels import triton as kernels_triton
from mogrifier_lm.kernels.choice import choose
from mogrifier_lm.kernels.cross_entropy import chunked, native, reference, triton

__all__ = ["BACKENDS", "Kernel", "resolve"]


class Kernel(NamedTuple):
    """Both take the arguments of `reference.nats`.

    `loss` is their sum, with gradient; `token_nats` the terms [N] float32, without.
    """

    loss: Callable[..., Tensor]
    token_nats: Callable[..., Tensor]


BACKENDS = {
    "reference": Kernel(reference.loss, reference.token_nats),
    "chunked": Kernel(chunked.loss, chunked.token_nats),
    "native": Kernel(native.loss, native.token_nats),
    "triton": Kernel(triton.loss, triton.token_nats),
}


def resolve(backend: str, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that runs: `auto` is the fastest one on `device`.

    Args, errors: as of `kernels.recurrence.resolve`.
    """
    unsupported = {
        "native": lambda: native.unsupported(device, dtype),
        "triton": lambda: kernels_triton.unsupported(device, dtype),
    }
    return choose(backend, device, ("reference", "chunked"), unsupported, "the output layer")
