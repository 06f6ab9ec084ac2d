"""What a fast backend asks of its arguments before it reads them: an error, no wrong number."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mogrifier_lm.kernels.precision import product_dtype
from mogrifier_lm.kernels.recurrence.reference import Weights

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts


def checked(
    backend: str,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """x, h and c in the dtype of the weights, and the dtype of products.

    Under autocast they may come in any dtype that it deals with; else in that of the weights, as
    torch.nn.LSTM wants it.

    Raises:
        ValueError: a dtype, device, layout or size that does not fit.
        RuntimeError: a transformation of torch.func, or a gradient of the mask, which the reference
            alone has.
    """
    dtype, device = weights.hh.dtype, weights.hh.device
    product = product_dtype(device.type, dtype)
    named = {"x": x, "h": h, "c": c}
    for name, tensor in _named(x, h, c, weights, mask):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(
                f"the {backend} backend does not run under torch.func: backend='reference' does"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the weights are on {device}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has layout {tensor.layout}, expected torch.strided")
        cast = name in named and product != dtype and tensor.dtype in NARROW
        if tensor.dtype != dtype and not cast:
            raise ValueError(f"{name} is {tensor.dtype}, the weights are {dtype}")
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the {backend} backend has no gradient of the state mask: backend='reference' has"
        )
    check_sizes(x, h, c, weights, mask)
    return x.to(dtype), h.to(dtype), c.to(dtype), product


def check_sizes(x: Tensor, h: Tensor, c: Tensor, weights: Weights, mask: Tensor | None) -> None:
    """The sizes of an LSTM, mLSTM or RLSTM layer's arguments.

    Raises:
        ValueError: they do not fit together.
    """
    if x.dim() != 3 or h.dim() != 2 or 0 in (len(x), h.shape[1], x.shape[2]):
        raise ValueError(f"x has shape {tuple(x.shape)} and h {tuple(h.shape)}, expected [T, B, I] "
                         "and [B, H], T, I and H at least 1")  # fmt: skip
    (T, B, I), H = x.shape, h.shape[1]  # noqa: E741
    rlstm = "weight_fu" in weights.more
    wanted = {
        "h": (B, H),
        "c": (B, H),
        "weight_ih": (2 * H if rlstm else 4 * H, I),
        "weight_hh": (3 * H if rlstm else 4 * H, H),
        "bias": (4 * H,),
        "weight_mx": (H, I),
        "weight_mh": (H, H),
        "weight_fu": (H, H),
        "weight_oc": (H, H),
        "state_mask": (1 if mask is not None and len(mask.shape) and len(mask) == 1 else T, B, H),
    }
    for i, r in enumerate(weights.rounds, start=1):
        target, source = (I, H) if i % 2 else (H, I)
        inner = r.weight.shape[-1] if r.right is not None else source
        wanted |= {f"round{i}_weight": (target, inner), f"round{i}_right": (inner, source)}
        wanted[f"round{i}_bias"] = (target,)
    for name, tensor in _named(x, h, c, weights, mask):
        if name != "x" and tuple(tensor.shape) != wanted[name]:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {shape}, expected {wanted[name]}: x is {T, B, I}")


def _named(
    x: Tensor, h: Tensor, c: Tensor, w: Weights, mask: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a call by its name."""
    yield from (("x", x), ("h", h), ("c", c), ("weight_ih", w.ih), ("weight_hh", w.hh))
    yield from w.more.items()
    if w.bias is not None:
        yield "bias", w.bias
    if mask is not None:
        yield "state_mask", mask
    for i, r in enumerate(w.rounds, start=1):
        yield f"round{i}_weight", r.weight
        if r.right is not None:
            yield f"round{i}_right", r.right
        if r.bias is not None:
            yield f"round{i}_bias", r.bias
