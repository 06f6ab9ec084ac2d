"""Layers on each other as one differentiable function, the upper ones close behind the lower ones.

Layer l + 1 follows layer l by a span of a few steps, forward and backward, each layer on a stream
of its own (a wavefront): the kernels of one step are too small to fill a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mogrifier_lm.kernels.precision import product_dtype, without_autocast
from mogrifier_lm.kernels.recurrence.autograd import flatten, unflatten
from mogrifier_lm.kernels.recurrence.reference import Options, Weights
from mogrifier_lm.kernels.recurrence.triton.layer import Layer
from mogrifier_lm.kernels.recurrence.triton.weights import padded, width

# Steps of a span without rounds and with them. On an H100, 24 M parameters, milliseconds of a whole
# step with spans of 2, 5 and 10: no rounds 5.34, 4.75, 4.59, five rounds 10.45, 10.58, 10.86.
SPAN, SPAN_OF_ROUNDS = 10, 2


class Call(NamedTuple):
    """What a call fixes besides tensors with gradients.

    `state_masks`: of each layer, [1 or T, B, H] or None; `between`: on the output of each layer
    but the last on its way to the next one, [1 or T, B, H] or None.
    """

    options: Options
    product: torch.dtype
    state_masks: Sequence[Tensor | None]
    between: Sequence[Tensor | None]
    sizes: Sequence[int]  # number of tensors in each layer's flattened weights


def stack(
    x: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Weights],
    options: Options,
    state_masks: Sequence[Tensor | None],
    between: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Run layers on each other over time; see `reference.recurrence` for one.

    Args:
        x: [T, B, I], of the first layer.
        states: (h, c) of each layer, [B, H].
        weights: of each layer.
        options: of every layer.
        state_masks, between: see `Call`; they have no gradient.

    Returns:
        Each layer's output [T, B, H], before the mask on its way up, and each layer's (h, c).
    """
    dtype = weights[0].hh.dtype
    flats = [flatten(w) for w in weights]
    call = Call(
        options,
        product_dtype(x.device.type, dtype),
        state_masks,
        between,
        [len(flat) for flat in flats],
    )
    x = x.to(dtype)
    tensors = [*(s.to(dtype) for state in states for s in state)]
    tensors += [p for flat in flats for p in flat]  # type: ignore[misc]
    inputs = (x, *tensors)
    # Triton launches where torch stands.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in inputs):
            results = _Stack.apply(call, *inputs)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad(), without_autocast(x.device.type):
                results = _results(_forward(call, x, tensors, save=False))
    n = len(weights)
    return list(results[:n]), list(zip(results[n : 2 * n], results[2 * n :], strict=True))


def in_waves(
    run: Callable[[int, range], None],
    layers: Sequence[int],
    spans: Sequence[range],
    device: torch.device,
) -> None:
    """Call `run` on each layer and span, where layer l needs that of the one before it.

    On a GPU each layer has its own stream.
    """
    if device.type != "cuda" or len(layers) == 1:
        for span in spans:
            for layer in layers:
                run(layer, span)
        return
    current = torch.cuda.current_stream(device)
    streams = _streams(device, len(layers))
    for stream in streams:
        stream.wait_stream(current)
    for span in spans:
        below = None
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                if below is not None:
                    stream.wait_event(below)
                run(layer, span)
                below = stream.record_event()
    for stream in streams:
        current.wait_stream(stream)


_kept: dict[torch.device, list[torch.cuda.Stream]] = {}


def _streams(device: torch.device, number: int) -> list[torch.cuda.Stream]:
    kept = _kept.setdefault(device, [])
    while len(kept) < number:
        kept.append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return kept[:number]


def _spans(steps: int, layers: Sequence[Layer]) -> list[range]:
    size = SPAN_OF_ROUNDS if layers[0].w.rounds else SPAN
    if len(layers) == 1:
        size = steps
    return [range(t, min(t + size, steps)) for t in range(0, steps, size)]


def _part(mask: Tensor | None, span: range) -> Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask[span.start : span.stop]


def _forward(call: Call, x: Tensor, tensors: Sequence[Any], save: bool) -> list[Layer]:
    n, (T, B, size_in) = len(call.sizes), x.shape
    flat, layers = list(tensors[2 * n :]), list[Layer]()
    for mask, size in zip(call.state_masks, call.sizes, strict=True):
        weights, flat = unflatten(tuple(flat[:size]), call.options.cell), flat[size:]
        hidden = weights.hh.shape[1]
        if not layers:
            source = padded(x, T, B, width(size_in), dtype=call.product)
        else:
            source = x.new_empty(T, B, width(size_in), dtype=call.product)
        if mask is not None:
            mask = padded(mask, len(mask), B, width(hidden), dtype=torch.float32)
        layers.append(Layer(weights, call.options, source, size_in, mask, save))
        size_in = hidden
    for layer, h, c in zip(layers, tensors[: 2 * n : 2], tensors[1 : 2 * n : 2], strict=True):
        layer.begin(h, c)
    between = _padded_between(call, layers)

    def run(i: int, span: range) -> None:
        layers[i].forward(span)
        if i + 1 < n:
            part = slice(span.start, span.stop)
            mask, source = _part(between[i], span), layers[i].output[part]
            if mask is None:
                layers[i + 1].x[part] = source
            else:
                torch.mul(source, mask, out=layers[i + 1].x[part])

    in_waves(run, range(n), _spans(T, layers), x.device)
    return layers


def _padded_between(call: Call, layers: Sequence[Layer]) -> list[Tensor | None]:
    return [
        None if mask is None else padded(mask, len(mask), low.B, low.H, dtype=torch.float32)
        for mask, low in zip(call.between, layers, strict=False)
    ]


def _results(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Outputs, last h and last c of the layers, without padding and of their own memory."""
    outputs = [layer.output[:, :, : layer.hidden_size].contiguous() for layer in layers]
    last_c = [layer.cs[-1, :, : layer.hidden_size].clone() for layer in layers]
    return (*outputs, *(output[-1].clone() for output in outputs), *last_c)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with without_autocast(x.device.type):
            layers = _forward(call, x, tensors, save=True)
            results = _results(layers)
        for layer in layers:
            del layer.output
        # Saved for the check that nobody has changed them since; the buffers are the layers' own.
        ctx.save_for_backward(x, *tensors)
        ctx.call, ctx.layers = call, layers
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_results: Tensor | None) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        with without_autocast(x.device.type):
            return None, *_backward(ctx.call, ctx.layers, x, tensors, d_results)


def _backward(
    call: Call,
    layers: Sequence[Layer],
    x: Tensor,
    tensors: Sequence[Any],
    d_results: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the states and the weights."""
    n, (T, B, input_size) = len(layers), x.shape
    between = _padded_between(call, layers)
    given: list[Tensor | None] = []  # of the outputs, as they came
    for i, layer in enumerate(layers):
        d_output, d_h, d_c = d_results[i::n]
        zeros = layer.cs.new_zeros(B, layer.H)
        if d_output is not None:
            d_output = padded(d_output, T, B, layer.H, dtype=torch.float32)
        given.append(d_output)
        if i + 1 < n or d_output is None:  # what comes from above is added on the way
            d_output = layer.cs.new_zeros(T, B, layer.H)
        layer.begin_backward(d_output, *(zeros if d is None else d for d in (d_h, d_c)))

    def run(i: int, span: range) -> None:
        if i + 1 < n:
            part = slice(span.start, span.stop)
            d, mask, own = layers[i + 1].d_x[part], _part(between[i], span), given[i]
            out = layers[i].d_output[part]
            torch.mul(d, 1.0 if mask is None else mask, out=out)
            if own is not None:
                out.add_(own[part])
        layers[i].backward(span)

    in_waves(run, range(n)[::-1], _spans(T, layers)[::-1], x.device)
    d_states, d_weights = list[Tensor](), list[Tensor | None]()
    flat = list(tensors[2 * n :])
    for layer, size in zip(layers, call.sizes, strict=True):
        weights, flat = unflatten(tuple(flat[:size]), call.options.cell), flat[size:]
        d_states += [d[:, : layer.hidden_size] for d in (layer.d_h, layer.d_c)]
        d_weights += flatten(layer.gradients(weights))
    return layers[0].d_x[:, :, :input_size], *d_states, *d_weights
