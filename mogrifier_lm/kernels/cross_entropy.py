"""The output layer's loss, without a tensor of the logits of all positions.

The softmax over V words at N positions has N V logits, and autograd keeps about three tensors of
that size alive. Here the rows are taken chunk by chunk, and each chunk leaves its part of the
gradients behind before the next one is computed, so that backward has only to scale them.

Shape legend: N positions, n positions of one chunk, V words, E output embedding size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100

# Logits of one chunk. On an AVX-512 CPU fewer make the products slow and more leave the cache; a
# GPU wants long kernels.
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int | None = None,
) -> Tensor:
    """The sum over rows of -ln softmax(hidden @ weight.T + bias)[target].

    Products run in the autocast dtype where autocast is on. The log-sum-exp and every sum over
    chunks are in float32 (float64 for float64 inputs). The gradients are computed together with the
    loss, and only those that are needed.

    Args:
        hidden: [N, E].
        weight: [V, E], the output embedding.
        bias: [V] or None.
        targets: [N] int64; a row with -100 scores zero and has no gradient.
        chunk: rows whose logits are alive at a time, default by `CHUNK_LOGITS`.

    Returns:
        A scalar, in nats.
    """
    parameters = [p for p in (hidden, weight, bias) if p is not None]
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return token_nats(hidden, weight, bias, targets, chunk=chunk).sum()
    nats: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk)
    return nats


@torch.no_grad()
def token_nats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int | None = None,
) -> Tensor:
    """-ln softmax(hidden @ weight.T + bias)[target] of each row [N], without gradient.

    Arguments as in `linear_cross_entropy`.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    nats_N = torch.empty(len(hidden), dtype=_accumulator(hidden), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _row_chunks(hidden, weight, chunk):
            nats_N[rows] = _softmax(hidden[rows], weight, bias, targets[rows]).nats_n
    return nats_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk: int | None,
    ) -> Tensor:
        h_NE, w_VE, b_V = _autocast(hidden_NE, weight_VE, bias_V)
        sums: dict[str, Any] = {"dtype": _accumulator(h_NE), "device": h_NE.device}
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        nats = torch.zeros((), **sums)
        d_hidden_NE = torch.zeros(h_NE.shape, **sums) if needs_hidden else None
        d_weight_VE = torch.zeros(w_VE.shape, **sums) if needs_weight else None
        d_bias_V = torch.zeros(len(w_VE), **sums) if needs_bias else None
        with torch.autocast(h_NE.device.type, enabled=False):
            for rows in _row_chunks(h_NE, w_VE, chunk):
                s = _softmax(h_NE[rows], w_VE, b_V, targets_N[rows])
                nats += s.nats_n.sum()
                # The logits' gradient is (exps - total at the target) / total: the division by
                # total, and the zero of an ignored row, go to the small factor of each product.
                d_nV = s.exps_nV.scatter_add_(1, s.targets_n1, -s.total_n1)
                scale_n1 = s.scored_n1 / s.total_n1
                if d_bias_V is not None:
                    d_bias_V.addmv_(d_nV.t(), scale_n1.squeeze(1))
                d_nV = d_nV.to(h_NE.dtype)
                if d_hidden_NE is not None:
                    torch.mul(d_nV @ w_VE, scale_n1, out=d_hidden_NE[rows])
                if d_weight_VE is not None:
                    scaled_nE = (h_NE[rows] * scale_n1).to(h_NE.dtype)
                    if d_weight_VE.dtype == h_NE.dtype:
                        d_weight_VE.addmm_(d_nV.t(), scaled_nE)
                    else:
                        d_weight_VE += d_nV.t() @ scaled_nE
        ctx.save_for_backward(d_hidden_NE, d_weight_VE, d_bias_V)
        ctx.dtypes = [None if p is None else p.dtype for p in (hidden_NE, weight_VE, bias_V)]
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if d is None else (d * d_nats).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None


class _Softmax(NamedTuple):
    exps_nV: Tensor  # exp(logit - the row's largest logit)
    total_n1: Tensor  # the row's sum of exps
    targets_n1: Tensor  # 0 in place of an ignored target
    scored_n1: Tensor  # False where the target is ignored
    nats_n: Tensor


def _softmax(hidden_nE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, targets_n: Tensor) -> Any:
    logits_nV = torch.nn.functional.linear(hidden_nE, weight_VE, bias_V).to(_accumulator(hidden_nE))
    logits_nV -= logits_nV.amax(1, keepdim=True)
    scored_n1 = (targets_n != IGNORED).unsqueeze(1)
    targets_n1 = targets_n.unsqueeze(1) * scored_n1
    target_logit_n1 = logits_nV.gather(1, targets_n1)
    exps_nV = logits_nV.exp_()
    total_n1 = exps_nV.sum(1, keepdim=True)
    nats_n1 = torch.where(scored_n1, total_n1.log() - target_logit_n1, 0)
    return _Softmax(exps_nV, total_n1, targets_n1, scored_n1, nats_n1.squeeze(1))


def _row_chunks(hidden_NE: Tensor, weight_VE: Tensor, chunk: int | None) -> list[slice]:
    """Slices of `chunk` rows, by default the fewest equal ones within `CHUNK_LOGITS`."""
    n = len(hidden_NE)
    if chunk is None:
        limit = CHUNK_LOGITS.get(hidden_NE.device.type, CHUNK_LOGITS["cpu"])
        n_chunks = -(-n * len(weight_VE) // limit)
        chunk = -(-n // max(1, n_chunks))
    return [slice(start, start + chunk) for start in range(0, n, max(1, chunk))]


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in the dtype in which their product runs."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
