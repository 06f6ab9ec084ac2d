"""The chunked loss with its passes over the logits in Triton: one kernel for a chunk."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.kernels import triton
from mogrifier_lm.kernels.cross_entropy import chunked


def softmax(logits_CV: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
    """As `chunked.softmax`."""
    from mogrifier_lm.kernels.cross_entropy import triton_kernel

    rows, classes = logits_CV.shape
    arguments: Any = (logits_CV, targets_C, nats_C, logits_CV.stride(0))
    constants: Any = {"V": classes, "GRADIENT": gradient, **triton_kernel.LAUNCH}
    if rows:
        with torch.cuda.device_of(logits_CV):  # type: ignore[no-untyped-call]
            triton_kernel.softmax[(rows,)](*arguments, **constants)


LAYER = partial(chunked.Library, softmax)


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """As `reference.loss`.

    Raises:
        ValueError: a device or dtype that this backend does not have.
    """
    _check(hidden, weight)
    return chunked.loss(hidden, weight, bias, targets, log_prior, ignore_index, LAYER)


def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """As `reference.token_nats`; raises as `loss` does."""
    _check(hidden, weight)
    return chunked.token_nats(hidden, weight, bias, targets, log_prior, ignore_index, LAYER)


def _check(hidden: Tensor, weight: Tensor) -> None:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if reason := triton.unsupported(weight.device, dtype):
        raise ValueError(reason)
