"""Linear layer and cross-entropy in one: the reference and its fast siblings, one signature."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mogrifier_lm.kernels import triton as kernels_triton
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

CONDITIONS = {
    "native": native.unsupported,
    "triton": kernels_triton.unsupported,
}  # of those that have any


def resolve(backend: str, device: str | torch.device, *, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that runs: `auto` is the fastest one on `device`.

    Args:
        backend: "auto" or a key of `BACKENDS`.
        device: of the parameters, as torch.device takes it.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown backend, or one that cannot run here, with the reason.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}, it must be one of auto, {', '.join(BACKENDS)}")
    if backend in ("reference", "chunked"):
        return backend
    fastest = "native" if torch.device(device).type == "cpu" else "triton"
    reason = CONDITIONS[fastest if backend == "auto" else backend](device, dtype)
    if reason is None:
        return fastest if backend == "auto" else backend
    if backend != "auto":
        raise ValueError(f"backend is {backend}, but {reason}; auto takes the fastest that can run")
    if torch.device(device).type in ("cpu", "cuda"):
        _say(reason)
    return "chunked"


@functools.cache  # once for each reason
def _say(reason: str) -> None:
    logging.getLogger(__name__).info("the output layer runs in plain torch operations: %s", reason)
