"""Fast backends inside torch.compile, torch.export and torch.jit.trace: a registered operator.

Eager calls do not come here: torch's own autograd function costs less. What a graph is made of sees
one operator that is opaque, and its backward, which runs the forward once more for what it needs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.kernels.precision import product_dtype
from mogrifier_lm.kernels.recurrence.arguments import check_sizes
from mogrifier_lm.kernels.recurrence.autograd import flatten, unflatten
from mogrifier_lm.kernels.recurrence.reference import Options, Weights

Recurrence = Callable[..., tuple[Tensor, Tensor, Tensor]]
EAGER: dict[str, Recurrence] = {}
"""Name of a backend → what the operator calls; filled by the package."""


def wanted() -> bool:
    """Whether a graph is being made of what is called now."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def call(
    backend: str,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.recurrence`, by the operator."""
    dtype = weights.hh.dtype
    product = product_dtype(x.device.type, dtype)  # no autocast is left when the graph runs
    _, cell, zigzag, cap = options
    tensors = [p for p in flatten(weights) if p is not None]
    present = "".join("-" if p is None else "+" for p in flatten(weights))  # of optional ones
    arguments = (backend, cell, zigzag, cap, product, present)
    results: tuple[Tensor, Tensor, Tensor] = _recurrence(x, h, c, state_mask, tensors, *arguments)
    return results


def _weights(tensors: Sequence[Tensor], present: str, cell: str) -> Weights:
    rest = iter(tensors)
    return unflatten(tuple(next(rest) if p == "+" else None for p in present), cell)


def _run(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    state_mask: Tensor | None,
    tensors: Sequence[Tensor],
    backend: str,
    cell: str,
    zigzag: bool,
    cap: bool,
    product: torch.dtype,
    present: str,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(tensors, present, cell)
    options = Options(_no_step, cell, zigzag, cap)
    narrow = product != weights.hh.dtype
    with torch.autocast(x.device.type, product if narrow else None, enabled=narrow):
        return EAGER[backend](x, h, c, weights, options, state_mask)


def _no_step(*_: Any) -> Any:
    raise RuntimeError("a second derivative inside a compiled graph: backend='reference' has it")


@torch.library.custom_op("mogrifier_lm::recurrence", mutates_args=())
def _recurrence(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    state_mask: Tensor | None,
    tensors: Sequence[Tensor],
    backend: str,
    cell: str,
    zigzag: bool,
    cap: bool,
    product: torch.dtype,
    present: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without gradient."""
    with torch.no_grad():
        arguments = (backend, cell, zigzag, cap, product, present)
        return _run(x, h, c, state_mask, tensors, *arguments)


@torch.library.custom_op("mogrifier_lm::recurrence_backward", mutates_args=())
def _recurrence_backward(
    d_output: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    state_mask: Tensor | None,
    tensors: Sequence[Tensor],
    backend: str,
    cell: str,
    zigzag: bool,
    cap: bool,
    product: torch.dtype,
    present: str,
) -> list[Tensor]:
    """Gradients of x, h, c and the weights."""
    inputs = [p.detach().requires_grad_() for p in (x, h, c, *tensors)]
    arguments = (backend, cell, zigzag, cap, product, present)
    with torch.enable_grad():
        outputs = _run(inputs[0], inputs[1], inputs[2], state_mask, inputs[3:], *arguments)
    return list(torch.autograd.grad(outputs, inputs, (d_output, d_h, d_c)))


@_recurrence.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, state_mask: Tensor | None, tensors: Sequence[Tensor],
      backend: str, cell: str, zigzag: bool, cap: bool, product: torch.dtype,
      present: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = _weights(tensors, present, cell)
    check_sizes(x, h, c, weights, state_mask)
    new = weights.hh.new_empty
    return new(*x.shape[:2], h.shape[1]), new(h.shape), new(c.shape)


@_recurrence_backward.register_fake
def _(d_output: Tensor, d_h: Tensor, d_c: Tensor, x: Tensor, h: Tensor, c: Tensor,
      state_mask: Tensor | None, tensors: Sequence[Tensor], *_: Any) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(p) for p in (x, h, c, *tensors)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, h, c, state_mask, tensors, *ctx.arguments = inputs
    ctx.save_for_backward(x, h, c, state_mask, *tensors)


def _backward(ctx: Any, d_output: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Any, ...]:
    x, h, c, state_mask, *tensors = ctx.saved_tensors
    gradients = (d_output.contiguous(), d_h, d_c)
    d_x, d_h, d_c, *d_tensors = _recurrence_backward(
        *gradients, x, h, c, state_mask, tensors, *ctx.arguments
    )
    return d_x, d_h, d_c, None, d_tensors, *[None] * len(ctx.arguments)


_recurrence.register_autograd(_backward, setup_context=_setup)
