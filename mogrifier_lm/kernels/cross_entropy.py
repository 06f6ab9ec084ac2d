"""Linear layer and cross-entropy in one, with the logits of one chunk of rows alive at a time.

The gradients are computed in the forward pass, while a chunk's softmax is at hand, so that no
product is done twice and nothing of size N * V is kept.

With `log_prior` it is that of a mixture of softmaxes: -ln sum_m prior_m softmax_m[target]. The
gradient through component m is that of its own softmax times m's posterior, so a mixture costs no
more than as many rows, and one form serves Mixture of Softmaxes (Yang et al., arXiv 1711.03953) and
the multi-sample dropout objective (Melis, arXiv 2211.01848), whose prior is 1 / samples.

Shape legend: N targets, M components of the mixture (1 without one), E features, V classes, K = E +
1 (the bias) rounded up, C rows of a chunk, R rows of a block. A row is a component of a target.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mogrifier_lm.kernels import cpp

IGNORE = -100
NATIVE = {torch.float32: "softmax_fp32", torch.bfloat16: "softmax_bf16"}


@functools.cache  # said once
def _library() -> ctypes.CDLL | None:
    """The passes over logits in C++; None where they cannot be compiled."""
    try:
        return cpp.load(Path(__file__).with_suffix(".cpp"))
    except OSError as reason:
        logging.getLogger(__name__).info("the softmax runs in plain torch operations: %s", reason)
        return None


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on (it leaves float64 alone), else the inputs' own."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows of logits at a time (C).

    Measured for V = 10,000 on a CPU with 2 MB of L2 cache: the passes over fp32 should find their
    rows in cache, products want more rows, most of all in bf16, where each chunk's weight gradient
    is added up in a pass of its own. On a GPU few large kernels win.
    """
    if device.type != "cpu":
        return 2048
    return 256 if dtype == _wide(dtype) else 1024


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def _scratch(use: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] to write to until the next call for the same use.

    On a CPU the memory is kept from call to call. Got anew each time, tens of MB between the small
    results that a caller keeps are what malloc cannot fit in again: scoring WikiText-2 at three
    temperatures grew by 79 MB a window.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    kept = _buffers.kept.get((use, dtype))
    if kept is None or kept.numel() < rows * columns:
        kept = _buffers.kept[use, dtype] = torch.empty(rows * columns, dtype=dtype)
    return kept[: rows * columns].view(rows, columns)


def _append(
    matrix: Tensor, column: Tensor | float, dtype: torch.dtype, scratch: bool = False
) -> Tensor:
    """[matrix, column, zeros]: the bias rides in the products, whose rows fill cache lines.

    bf16 products with AMX are up to 1.6 times faster so than at E = 200.
    """
    rows, features = matrix.shape
    align = 64 // dtype.itemsize
    width = -(-(features + 1) // align) * align
    if scratch:
        padded = _scratch("weight", rows, width, dtype, matrix.device)
    else:
        padded = matrix.new_empty(rows, width, dtype=dtype)
    padded[:, :features] = matrix
    padded[:, features] = column
    padded[:, features + 1 :] = 0
    return padded


def _softmax_(logits_RV: Tensor, targets_R1: Tensor) -> Tensor:
    """Turn logits into their softmax in place; returns -ln p of the targets, [R, 1]."""
    top = logits_RV.amax(1, keepdim=True)
    target_logit = logits_RV.gather(1, targets_R1)
    torch.softmax(logits_RV, 1, out=logits_RV)
    # The largest p is at least 1 / V: its logarithm is exact where that of a target's is not.
    return top - logits_RV.amax(1, keepdim=True).log() - target_logit


def _portable(logits_CV: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
    """Write -ln p of the targets; with `gradient` the logits become d of these / d logits.

    Rows in low precision pass through a block of fp32. Blocks of 32 rows were no faster than of
    128, and where other processes hold the cores each further operation waits for its threads.
    """
    wide = nats_C.dtype
    for logits_RV, targets_R, nats_R in zip(
        *(torch.split(tensor, 128) for tensor in (logits_CV, targets_C, nats_C)), strict=True
    ):
        targets_R1 = targets_R.unsqueeze(1)
        p_RV = logits_RV.to(wide)
        nats_R.copy_(_softmax_(p_RV, targets_R1).squeeze(1))
        if gradient:
            p_RV.scatter_add_(1, targets_R1, p_RV.new_full((), -1.0).expand_as(targets_R1))
            logits_RV.copy_(p_RV)


def _run(
    h_NK: Tensor,
    w_VK: Tensor,
    targets: Tensor,
    log_prior_NM: Tensor | None,
    use_gradient: Callable[[slice, Tensor, Tensor | None], None] | None,
) -> tuple[Tensor, Tensor | None]:
    """-ln p of each target [N], 0 where ignored, and the components' posteriors [N, M].

    Hands each chunk's d nats / d logits on, but for the factor of each row that stands beside it,
    its posterior (None: all 1). Rows whose target is ignored are handed on with a gradient that is
    to be disregarded.
    """
    dtype, V = h_NK.dtype, len(w_VK)
    mixture = 1 if log_prior_NM is None else log_prior_NM.shape[1]
    joint_NM = None if log_prior_NM is None else log_prior_NM.to(_wide(dtype), copy=True)
    nats_N = h_NK.new_empty(len(h_NK), dtype=_wide(dtype))
    targets_N = targets.masked_fill(targets == IGNORE, 0).repeat_interleave(mixture)
    native = _library() if h_NK.is_cpu and dtype in NATIVE else None
    if native and not ((targets_N >= 0) & (targets_N < V)).all():
        raise IndexError(f"a target is out of bounds: it must lie in [0, {V}) or be {IGNORE}")
    chunk = max(_chunk_rows(h_NK.device, dtype) // mixture, 1) * mixture
    # Whole vectors, whose end gets zeros: torch's bf16 products read (and ignore) it.
    width = -(-V // 16) * 16 if native else V
    buffer = _scratch("logits", min(chunk, len(h_NK)), width, dtype, h_NK.device)
    for start in range(0, len(h_NK), chunk):
        rows = slice(start, min(start + chunk, len(h_NK)))
        logits_CV = buffer[: rows.stop - start, :V]
        torch.mm(h_NK[rows], w_VK.T, out=logits_CV)
        if native:
            pointers = (t.data_ptr() for t in (logits_CV, targets_N[rows], nats_N[rows]))
            sizes = (len(logits_CV), V, width, use_gradient is not None, torch.get_num_threads())
            getattr(native, NATIVE[dtype])(*map(c_void_p, pointers), *map(c_int64, sizes))
        else:
            _portable(logits_CV, targets_N[rows], nats_N[rows], use_gradient is not None)
        posterior_C1 = None
        if joint_NM is not None:
            places = slice(rows.start // mixture, rows.stop // mixture)
            joint_NM[places] -= nats_N[rows].view(-1, mixture)
            posterior_C1 = joint_NM[places].softmax(1).view(-1, 1)
        if use_gradient is not None:
            use_gradient(rows, logits_CV, posterior_C1)
    if joint_NM is None:
        return nats_N.masked_fill_(targets == IGNORE, 0), None
    return (-joint_NM.logsumexp(1)).masked_fill_(targets == IGNORE, 0), joint_NM.softmax(1)


def _nats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_prior: Tensor | None
) -> Tensor:
    dtype = _product_dtype(hidden, weight)
    h_NK = _append(hidden, 1, dtype)
    w_VK = _append(weight, 0 if bias is None else bias, dtype, scratch=True)
    with torch.autocast(hidden.device.type, enabled=False):
        return _run(h_NK, w_VK, targets, log_prior, None)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        log_prior: Tensor | None,
    ) -> Tensor:
        dtype = _product_dtype(hidden, weight)
        needs_h, needs_w, needs_b, _, _ = ctx.needs_input_grad
        h_NK = _append(hidden, 1, dtype)
        w_VK = _append(weight, 0 if bias is None else bias, dtype, scratch=True)
        mixture = 1 if log_prior is None else log_prior.shape[1]
        ignored_N1 = (targets == IGNORE).repeat_interleave(mixture).unsqueeze(1)
        kept_NK = h_NK.masked_fill(ignored_N1, 0)
        grad_h_NK = torch.empty_like(h_NK) if needs_h else None
        grad_w_VK = torch.empty_like(w_VK, dtype=_wide(dtype)) if needs_w or needs_b else None
        if grad_w_VK is not None and len(h_NK) == 0:
            grad_w_VK.zero_()

        def use_gradient(rows: slice, gradient_CV: Tensor, posterior_C1: Tensor | None) -> None:
            if grad_h_NK is not None:
                torch.mm(gradient_CV, w_VK, out=grad_h_NK[rows])
            kept_CK = kept_NK[rows]
            if posterior_C1 is not None:  # not on the logits, which are the widest
                if grad_h_NK is not None:
                    grad_h_NK[rows] *= posterior_C1
                kept_CK = (kept_CK * posterior_C1).to(dtype)
            if grad_w_VK is None:
                return
            if grad_w_VK.dtype != dtype:
                product_VK = gradient_CV.T @ kept_CK
                grad_w_VK.copy_(product_VK) if rows.start == 0 else grad_w_VK.add_(product_VK)
            elif rows.start == 0:
                torch.mm(gradient_CV.T, kept_CK, out=grad_w_VK)
            else:
                grad_w_VK.addmm_(gradient_CV.T, kept_CK)

        with torch.autocast(hidden.device.type, enabled=False):
            needed = needs_h or needs_w or needs_b
            nats, posterior = _run(h_NK, w_VK, targets, log_prior, use_gradient if needed else None)
        if grad_h_NK is not None:
            grad_h_NK.masked_fill_(ignored_N1, 0)
        if posterior is not None:
            posterior.masked_fill_((targets == IGNORE).unsqueeze(1), 0)
        ctx.save_for_backward(grad_h_NK, grad_w_VK, posterior)
        ctx.features = hidden.shape[1]
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_NK, grad_w_VK, posterior_NM = ctx.saved_tensors
        needs_h, needs_w, needs_b, _, needs_prior = ctx.needs_input_grad
        features = ctx.features
        return (
            grad_h_NK[:, :features].to(grad_output.dtype) * grad_output if needs_h else None,
            grad_w_VK[:, :features] * grad_output if needs_w else None,
            grad_w_VK[:, features] * grad_output if needs_b else None,
            None,
            -posterior_NM * grad_output if needs_prior else None,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None = None,
) -> Tensor:
    """Sum over targets of -ln softmax(hidden @ weight.T + bias)[target], in nats.

    Under `torch.autocast` the products run in the autocast dtype; the softmax, the sum and the
    weight's gradient are fp32 at least.

    Args:
        hidden: [N, E], or [N * M, E] with the components of one target side by side.
        weight: [V, E].
        bias: [V] or None.
        targets: [N] int64; those of -100 score zero.
        log_prior: [N, M] of a mixture of M softmaxes, or None.
    """
    if not torch.is_grad_enabled():
        return _nats(hidden, weight, bias, targets, log_prior).sum()
    nats: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, log_prior)  # type: ignore[no-untyped-call]
    return nats


def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None = None,
) -> Tensor:
    """The terms of `linear_cross_entropy`, [N] float32, without gradient."""
    with torch.no_grad():
        return _nats(hidden, weight, bias, targets, log_prior).float()
