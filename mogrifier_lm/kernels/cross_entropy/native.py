"""The chunked loss on a CPU in C++ (native.cpp): in fp32 the whole layer, in bf16 its softmax.

The library's bf16 products run at the processor's rate, with AMX too. Its fp32 products leave half
of an AMD processor's AVX-512 unused.

Shape legend: as of chunked.py; P the rows of a chunk rounded up to whole vectors.
"""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mogrifier_lm.kernels import cpp
from mogrifier_lm.kernels.cross_entropy import chunked
from mogrifier_lm.kernels.precision import product_dtype


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
    return cpp.load(Path(__file__).with_suffix(".cpp"), (ctypes.sizeof(_Layer),))


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in "rows pitch features width classes block threads gradient add".split()
    ] + [
        (name, c_void_p)
        for name in (
            "hidden weight bias targets packed logits sums nats kept d_weight d_hidden"
        ).split()
    ]


class Layer:
    """A `chunked.Layer` in fp32."""

    # The logits of so many rows and classes lie in the second-level cache. P is no multiple of 128,
    # where a column's classes would crowd into few sets of the first-level cache.
    chunk, block = 368, 128

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype).resolve_neg().contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype).resolve_neg().contiguous()

    def nats(self, h_CK: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
        (rows, width), (classes, features) = h_CK.shape, self.weight.shape
        lanes, threads = library().lanes(), torch.get_num_threads()
        pitch = -(-rows // lanes) * lanes
        pitch += lanes if pitch % 128 == 0 else 0

        def buffer(use: str, lines: int, columns: int) -> Tensor:
            return chunked.scratch(use, lines, columns, h_CK.dtype, h_CK.device)

        logits = buffer("logits", classes if gradient else threads * self.block, pitch)
        packed, sums = buffer("packed", pitch, width), buffer("sums", 1 + 2 * threads, pitch)
        self.held = h_CK, targets_C, nats_C, logits, packed, sums
        self.job = _Layer(
            rows=rows,
            pitch=pitch,
            features=features,
            width=width,
            classes=classes,
            block=self.block,
            threads=threads,
            gradient=gradient,
            hidden=h_CK.data_ptr(),
            weight=self.weight.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            targets=targets_C.data_ptr(),
            packed=packed.data_ptr(),
            logits=logits.data_ptr(),
            sums=sums.data_ptr(),
            nats=nats_C.data_ptr(),
        )
        library().layer_forward(ctypes.byref(self.job))

    def gradients(
        self, grad_h_CK: Tensor | None, kept_CK: Tensor, grad_w_VK: Tensor | None, add: bool
    ) -> None:
        job, d_hidden = self.job, None
        if grad_h_CK is not None:
            d_hidden = torch.zeros(job.threads, job.features, job.pitch)
            job.d_hidden = d_hidden.data_ptr()
        job.kept, job.add = kept_CK.data_ptr(), add
        job.d_weight = None if grad_w_VK is None else grad_w_VK.data_ptr()
        library().layer_backward(ctypes.byref(job))
        if grad_h_CK is not None and d_hidden is not None:
            grad_h_CK.zero_()[:, : job.features] = d_hidden.sum(0)[:, : job.rows].T


def softmax(logits_CV: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
    """As `chunked.softmax`, of bf16.

    Rows begin whole vectors apart; what lies between is written to.
    """
    (rows, classes), width = logits_CV.shape, logits_CV.stride(0)
    pointers = (t.data_ptr() for t in (logits_CV, targets_C, nats_C))
    sizes = (rows, classes, width, gradient, torch.get_num_threads())
    library().softmax_bf16(*map(c_void_p, pointers), *map(c_int64, sizes))


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
    how = _check(hidden, weight)
    return chunked.loss(hidden, weight, bias, targets, log_prior, ignore_index, *how)


def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """As `reference.token_nats`; raises as `loss` does."""
    how = _check(hidden, weight)
    return chunked.token_nats(hidden, weight, bias, targets, log_prior, ignore_index, *how)


def _check(hidden: Tensor, weight: Tensor) -> tuple[chunked.MakeLayer, torch.dtype]:
    """The layer and its products' dtype: autocast's bf16, else float32 (float16's values too)."""
    if reason := unsupported(weight.device, torch.promote_types(hidden.dtype, weight.dtype)):
        raise ValueError(reason)
    if product_dtype("cpu", weight.dtype) == torch.bfloat16:
        return partial(chunked.Library, softmax), torch.bfloat16
    return Layer, torch.float32
