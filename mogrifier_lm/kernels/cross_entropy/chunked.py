"""The loss of the output layer with the logits of one chunk of rows alive at a time.

The gradients are computed in the forward pass, while a chunk's softmax is at hand, so that no
product is done twice and nothing of size N * V is kept.

The gradient through component m of a mixture is that of its own softmax times m's posterior, so a
mixture costs no more than as many rows.

Shape legend: N targets, M components of the mixture (1 without one), E features, V classes, K = E +
1 (the bias) rounded up, C rows of a chunk, R rows of a block. A row is a component of a target.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mogrifier_lm.kernels.precision import product_dtype, without_autocast

# Passes over a chunk's logits [C, V]: (logits, targets [C], nats [C], gradient) -> None.
Softmax = Callable[[Tensor, Tensor, Tensor, bool], None]


class Layer(Protocol):
    """The output layer over one chunk of rows after the other."""

    chunk: int  # rows at most

    def nats(self, h_CK: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
        """Write -ln p of the targets; with `gradient`, `gradients` may follow."""

    def gradients(
        self, grad_h_CK: Tensor | None, kept_CK: Tensor, grad_w_VK: Tensor | None, add: bool
    ) -> None:
        """Write (or add to the weight's) gradients of the nats of the chunk before.

        Args:
            grad_h_CK: of the hidden vectors, beyond E of anything finite.
            kept_CK: the hidden vectors, each times what its row counts for the weight.
            grad_w_VK: of the weight and, beside it, the bias.
            add: to `grad_w_VK`.
        """


MakeLayer = Callable[[Tensor, Tensor | None, torch.dtype], Layer]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk_rows(device: torch.device, dtype: torch.dtype, classes: int) -> int:
    """Rows of logits at a time (C).

    Measured for V = 10,000 on a CPU with 2 MB of L2 cache: the passes over fp32 should find their
    rows in cache, products want more rows, most of all in bf16, where each chunk's weight gradient
    is added up in a pass of its own. On a GPU few large kernels win: 128 M logits.
    """
    if device.type != "cpu":
        return max(2**27 // classes, 256)
    return 256 if dtype == _wide(dtype) else 1024


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
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
    matrix: Tensor, column: Tensor | float, dtype: torch.dtype, keep: bool = False
) -> Tensor:
    """[matrix, column, zeros]: the bias rides in the products, whose rows fill cache lines.

    bf16 products with AMX are up to 1.6 times faster so than at E = 200.
    """
    rows, features = matrix.shape
    align = 64 // dtype.itemsize
    width = -(-(features + 1) // align) * align
    if keep:
        padded = scratch("weight", rows, width, dtype, matrix.device)
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


def softmax(logits_CV: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
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


class Library:
    """Products by torch's libraries, a softmax of its rows between them."""

    def __init__(
        self, softmax: Softmax, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.softmax = softmax
        self.w_VK = _append(weight, 0 if bias is None else bias, dtype, keep=True)
        self.chunk = _chunk_rows(weight.device, dtype, len(weight))

    def nats(self, h_CK: Tensor, targets_C: Tensor, nats_C: Tensor, gradient: bool) -> None:
        rows, V = len(h_CK), len(self.w_VK)
        # Others than torch's take whole vectors, and torch's bf16 products read (and ignore) their
        # end.
        width = V if self.softmax is softmax else -(-V // 16) * 16
        self.logits_CV = scratch("logits", rows, width, h_CK.dtype, h_CK.device)[:, :V]
        torch.mm(h_CK, self.w_VK.T, out=self.logits_CV)
        self.softmax(self.logits_CV, targets_C, nats_C, gradient)

    def gradients(
        self, grad_h_CK: Tensor | None, kept_CK: Tensor, grad_w_VK: Tensor | None, add: bool
    ) -> None:
        gradient_CV = self.logits_CV
        if grad_h_CK is not None:
            torch.mm(gradient_CV, self.w_VK, out=grad_h_CK)
        if grad_w_VK is None:
            return
        if grad_w_VK.dtype != kept_CK.dtype:
            product_VK = gradient_CV.T @ kept_CK
            grad_w_VK.add_(product_VK) if add else grad_w_VK.copy_(product_VK)
        elif add:
            grad_w_VK.addmm_(gradient_CV.T, kept_CK)
        else:
            torch.mm(gradient_CV.T, kept_CK, out=grad_w_VK)


_BY_LIBRARY = partial(Library, softmax)


class _Problem(NamedTuple):
    """What the chunks are cut from, and what runs over them."""

    h_NK: Tensor
    targets: Tensor
    log_prior: Tensor | None
    ignore_index: int
    layer: Layer

    @property
    def mixture(self) -> int:
        return 1 if self.log_prior is None else self.log_prior.shape[1]

    @property
    def ignored(self) -> Tensor:
        return self.targets == self.ignore_index


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_prior: Tensor | None
) -> None:
    """Nothing is read that does not fit.

    Raises:
        TypeError: a dtype.
        ValueError: a size, device or layout.
    """
    named = {"hidden": hidden, "weight": weight, "bias": bias, "log_prior": log_prior}
    tensors = {name: t for name, t in named.items() if t is not None}
    cast = product_dtype(hidden.device.type, weight.dtype) != weight.dtype  # autocast is on
    for name, t in tensors.items():
        narrow = t.dtype != torch.float64  # which autocast spares
        same = (cast and narrow) or name == "log_prior" or t.dtype == weight.dtype
        if not t.is_floating_point() or not same:
            raise TypeError(f"{name} is {t.dtype}, the weight {weight.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}, they must be torch.int64")
    for name, t in (tensors | {"targets": targets}).items():
        if t.device != weight.device or t.layout != torch.strided:
            raise ValueError(f"{name} is on {t.device} ({t.layout}), the weight on {weight.device}")
    N = targets.shape[0] if targets.dim() == 1 else -1
    M = log_prior.shape[1] if log_prior is not None and log_prior.dim() == 2 else 1
    wanted: dict[str, tuple[int, ...]] = {
        "hidden": (N * M, weight.shape[-1] if weight.dim() == 2 else -1),
        "weight": (len(weight), weight.shape[-1]),
        "bias": (len(weight),),
        "log_prior": (N, M),
    }
    for name, t in tensors.items():
        if tuple(t.shape) != wanted[name]:
            shapes = {n: tuple(s.shape) for n, s in (tensors | {"targets": targets}).items()}
            raise ValueError(f"{name} does not fit: {shapes}")


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
    make: MakeLayer,
    dtype: torch.dtype | None,
) -> _Problem:
    _check(hidden, weight, bias, targets, log_prior)
    V = len(weight)
    if targets.is_cpu and len(targets):  # on other devices the gather says so
        outside = (targets < 0) | (targets >= V)
        if (outside & (targets != ignore_index)).any():
            raise IndexError(
                f"a target is out of bounds: it must lie in [0, {V}) or be {ignore_index}"
            )
    if dtype is None:
        dtype = product_dtype(hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype))
    h_NK = _append(hidden, 1, dtype)
    return _Problem(h_NK, targets, log_prior, ignore_index, make(weight, bias, dtype))


def _run(
    p: _Problem, use_gradient: Callable[[slice, Tensor | None], None] | None
) -> tuple[Tensor, Tensor | None]:
    """-ln p of each target [N], 0 where ignored, and the components' posteriors [N, M].

    Calls back when the layer has a chunk's gradients, with the rows and the factor of each, its
    posterior (None: all 1). Those of a row whose target is ignored are to be disregarded.
    """
    h_NK, mixture = p.h_NK, p.mixture
    joint_NM = None if p.log_prior is None else p.log_prior.to(_wide(h_NK.dtype), copy=True)
    nats_N = h_NK.new_empty(len(h_NK), dtype=_wide(h_NK.dtype))
    targets_N = p.targets.masked_fill(p.ignored, 0).repeat_interleave(mixture)
    chunk = max(p.layer.chunk // mixture, 1) * mixture
    for start in range(0, len(h_NK), chunk):
        rows = slice(start, min(start + chunk, len(h_NK)))
        p.layer.nats(h_NK[rows], targets_N[rows], nats_N[rows], use_gradient is not None)
        posterior_C1 = None
        if joint_NM is not None:
            places = slice(rows.start // mixture, rows.stop // mixture)
            joint_NM[places] -= nats_N[rows].view(-1, mixture)
            posterior_C1 = joint_NM[places].softmax(1).view(-1, 1)
        if use_gradient is not None:
            use_gradient(rows, posterior_C1)
    if joint_NM is None:
        return nats_N.masked_fill_(p.ignored, 0), None
    return (-joint_NM.logsumexp(1)).masked_fill_(p.ignored, 0), joint_NM.softmax(1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_prior: Tensor | None,
        *others: Any,
    ) -> Tensor:
        targets, ignore_index, make, dtype = others
        p = _problem(hidden, weight, bias, targets, log_prior, ignore_index, make, dtype)
        h_NK, dtype = p.h_NK, p.h_NK.dtype
        needs_h, needs_w, needs_b, *_ = ctx.needs_input_grad
        ignored_N1 = p.ignored.repeat_interleave(p.mixture).unsqueeze(1)
        kept_NK = h_NK.masked_fill(ignored_N1, 0)
        grad_h_NK = torch.empty_like(h_NK) if needs_h else None
        grad_w_VK = None
        if needs_w or needs_b:
            grad_w_VK = h_NK.new_empty(len(weight), h_NK.shape[1], dtype=_wide(dtype))
            if len(h_NK) == 0:
                grad_w_VK.zero_()

        def use_gradient(rows: slice, posterior_C1: Tensor | None) -> None:
            grad_h_CK = None if grad_h_NK is None else grad_h_NK[rows]
            kept_CK = kept_NK[rows]
            if posterior_C1 is not None:  # not on the logits, which are the widest
                kept_CK = (kept_CK * posterior_C1).to(dtype)
            p.layer.gradients(grad_h_CK, kept_CK, grad_w_VK, add=rows.start > 0)
            if grad_h_CK is not None and posterior_C1 is not None:
                grad_h_CK *= posterior_C1

        with without_autocast(hidden.device.type):
            needed = needs_h or needs_w or needs_b
            nats, posterior = _run(p, use_gradient if needed else None)
        if grad_h_NK is not None:
            grad_h_NK.masked_fill_(ignored_N1, 0)
        if posterior is not None:
            posterior.masked_fill_(p.ignored.unsqueeze(1), 0)
        ctx.save_for_backward(grad_h_NK, grad_w_VK, posterior)
        ctx.features = hidden.shape[1]
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_NK, grad_w_VK, posterior_NM = ctx.saved_tensors
        needs_h, needs_w, needs_b, needs_prior, *_ = ctx.needs_input_grad
        features = ctx.features
        return (
            grad_h_NK[:, :features].to(grad_output.dtype) * grad_output if needs_h else None,
            grad_w_VK[:, :features] * grad_output if needs_w else None,
            grad_w_VK[:, features] * grad_output if needs_b else None,
            -posterior_NM * grad_output if needs_prior else None,
            *[None] * 4,
        )


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
    make: MakeLayer = _BY_LIBRARY,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.loss`, in chunks.

    Args:
        hidden, weight, bias, targets, log_prior, ignore_index: as there.
        make: the layer that runs over the chunks, of the weight, the bias and `dtype`.
        dtype: of the operands of products; None: autocast's or their own.
    """
    if not torch.is_grad_enabled():
        terms = _nats(hidden, weight, bias, targets, log_prior, ignore_index, make, dtype)
        return terms.sum()
    others = (targets, ignore_index, make, dtype)
    nats: Tensor = _Loss.apply(hidden, weight, bias, log_prior, *others)  # type: ignore[no-untyped-call]
    return nats


@torch.no_grad()
def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prior: Tensor | None,
    ignore_index: int,
    make: MakeLayer = _BY_LIBRARY,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.token_nats`, in chunks; further arguments as `loss` has them."""
    terms = _nats(hidden, weight, bias, targets, log_prior, ignore_index, make, dtype)
    return terms.float()


def _nats(hidden: Tensor, *arguments: Any) -> Tensor:
    p = _problem(hidden, *arguments)
    with without_autocast(hidden.device.type):
        return _run(p, None)[0]
