"""The weights of a layer as the kernels want them, and their gradients back in their own shapes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogrifier_lm.kernels.recurrence.reference import Round, Weights
from mogrifier_lm.kernels.recurrence.triton import kernels


def width(size: int) -> int:
    return -(-size // kernels.ALIGN) * kernels.ALIGN


def padded(tensor: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, with zeros to `shape`; itself where nothing is to be done."""
    if tuple(tensor.shape) == shape:
        return tensor.to(dtype).contiguous()
    out = tensor.new_zeros(shape, dtype=dtype)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


class Packed(NamedTuple):
    """The weights of a layer in the dtype of products, padded; biases in fp32.

    `w` [4H, I + H] holds a unit's gates in rows side by side; the others are as in `Weights`, a
    bias that is missing zeros. The RLSTM's bias of o stands in `bias_o` and not in `bias`.
    """

    w: Tensor
    bias: Tensor
    rounds: list[Round]
    mx: Any
    mh: Any
    fu: Any
    oc: Any
    bias_o: Any


def _split(rows: Tensor, gates: int) -> Tensor:
    """[gates * H, n] as [H, gates, n]."""
    return rows.reshape(gates, -1, rows.shape[1]).transpose(0, 1)


def pack(weights: Weights, cell: str, input_size: int, product: torch.dtype) -> Packed:
    H, hidden = weights.hh.shape[1], width(weights.hh.shape[1])
    start = width(input_size)  # of h among the columns
    w = weights.hh.new_zeros(hidden, 4, start + hidden, dtype=product)
    bias = weights.hh.new_zeros(hidden, 4, dtype=torch.float32)
    bias_o = None
    if cell == "rlstm":
        w[:H, ::2, :input_size] = _split(weights.ih, 2)
        w[:H, :3, start : start + H] = _split(weights.hh, 3)
        bias_o = bias.new_zeros(hidden)
    else:
        w[:H, :, :input_size] = _split(weights.ih, 4)
        w[:H, :, start : start + H] = _split(weights.hh, 4)
    if weights.bias is not None:
        bias[:H] = weights.bias.view(4, H).t()
        if bias_o is not None:
            bias_o[:H] = bias[:H, 3]
            bias[:, 3] = 0
    known: dict[int, Tensor] = {}  # shared by several rounds

    def matrix(p: Tensor | None) -> Any:
        if p is not None and id(p) not in known:
            known[id(p)] = padded(p, width(p.shape[0]), width(p.shape[1]), dtype=product)
        return None if p is None else known[id(p)]

    def vector(p: Tensor | None, size: int) -> Tensor:
        return bias.new_zeros(size) if p is None else padded(p, size, dtype=torch.float32)

    rounds = [
        Round(matrix(r.weight), matrix(r.right), vector(r.bias, width(r.weight.shape[0])))
        for r in weights.rounds
    ]
    mx, mh, fu, oc = (matrix(weights.more.get(f"weight_{k}")) for k in ("mx", "mh", "fu", "oc"))
    return Packed(w.flatten(0, 1), bias.flatten(), rounds, mx, mh, fu, oc, bias_o)


def unpack(
    weights: Weights,
    cell: str,
    d_w: tuple[Tensor, Tensor],
    d_bias: Tensor,
    d_rounds: Sequence[tuple[Any, ...]],
    d_others: Mapping[str, Tensor],
) -> Weights:
    """Gradients in the shapes and dtype of `weights`.

    Args:
        weights: whose gradients they are.
        cell: of the layer.
        d_w: [4H, I] and [4H, H], the two parts of `Packed.w`.
        d_bias: [4H] of `Packed.bias`.
        d_rounds: of each round's weight, right and bias.
        d_others: of the other matrices, and `bias_o`.
    """
    H, dtype = weights.hh.shape[1], weights.hh.dtype

    def cut(p: Tensor | None, d: Any) -> Any:
        return None if p is None else d[tuple(map(slice, p.shape))].to(dtype)

    def by_gates(rows: Tensor) -> Tensor:
        return rows.view(-1, 4, *rows.shape[1:])[:H].transpose(0, 1)

    sizes = weights.ih.shape[1], H
    d_ih, d_hh = (by_gates(d)[:, :, :size] for d, size in zip(d_w, sizes, strict=True))
    d_bias = by_gates(d_bias)
    if cell == "rlstm":
        d_ih, d_hh = d_ih[::2], d_hh[:3]
        d_bias = torch.cat((d_bias[:3], d_others["bias_o"][None, :H]))
    pairs = zip(weights.rounds, d_rounds, strict=True)
    return Weights(
        d_ih.to(dtype).flatten(0, 1),
        d_hh.to(dtype).flatten(0, 1),
        None if weights.bias is None else d_bias.to(dtype).flatten(),
        tuple(Round(*(cut(p, d) for p, d in zip(r, ds, strict=True))) for r, ds in pairs),
        {k: cut(p, d_others[k.removeprefix("weight_")]) for k, p in weights.more.items()},
    )
