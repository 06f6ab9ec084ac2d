"""The chunked loss on a CPU with its passes over the logits in C++ (native.cpp), fp32 and bf16."""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mogrifier_lm.kernels import cpp
from mogrifier_lm.kernels.cross_entropy import chunked
from mogrifier_lm.kernels.precision import product_dtype

SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def unsupported(device: str | torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run with such parameters here, in one line; None where it can."""
    if torch.device(device).type != "cpu":
        return f"the native backend runs on cpu, not on {device}"
    if dtype != torch.float32:
        return f"the native backend takes float32 parameters, not {dtype}"
    try:
        library()
    except OSError as e:
        return str(e)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled passes.

    Raises:
        OSError: they cannot be compiled here, with the reason in one line.
    """
    return cpp.load(Path(__file__).with_suffix(".cpp"))


def softmax(logits_CV: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
    """As `chunked.softmax`; rows begin whole vectors apart, what lies between is written to."""
    (rows, classes), width = logits_CV.shape, logits_CV.stride(0)
    pointers = (t.data_ptr() for t in (logits_CV, targets_C, nats_C))
    sizes = (rows, classes, width, gradient, torch.get_num_threads())
    function = getattr(library(), f"softmax_{SUFFIX[logits_CV.dtype]}")
    function(*map(c_void_p, pointers), *map(c_int64, sizes))


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
    dtype = _check(hidden, weight)
    return chunked.loss(hidden, weight, bias, targets, log_prior, ignore_index, softmax, dtype)


def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """As `reference.token_nats`; raises as `loss` does."""
    dtype = _check(hidden, weight)
    return chunked.token_nats(
        hidden, weight, bias, targets, log_prior, ignore_index, softmax, dtype
    )


def _check(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of products: autocast's bf16, else float32, which holds float16's values too."""
    if reason := unsupported(weight.device, torch.promote_types(hidden.dtype, weight.dtype)):
        raise ValueError(reason)
    product = product_dtype("cpu", weight.dtype)
    return product if product in SUFFIX else torch.float32
