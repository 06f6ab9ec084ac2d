"""The recurrences with an explicit backward through time, in plain torch operations.

Autograd's loop pays for a node per operation and forms every weight gradient step by step. Here
the loops hold only what is sequential: factors of the local derivatives are computed for all steps
at once before the backward loop, each weight gradient is one product over all T * B rows after it,
and every buffer is allocated before its loop.

Under autocast the products run in its dtype; states, gates and sums stay in the weights' dtype.

Shape legend: T time steps, B streams, I input size, H hidden size, n target size of a round,
k rank. S is T where a backward may follow, else SLOTS at most: a step's activations are then
overwritten by a later one's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogrifier_lm.kernels.precision import without_autocast
from mogrifier_lm.kernels.recurrence import operators
from mogrifier_lm.kernels.recurrence.arguments import checked
from mogrifier_lm.kernels.recurrence.autograd import (
    MORE,
    before,
    capped_share,
    flatten,
    gradients,
    twice_differentiable,
    unflatten,
)
from mogrifier_lm.kernels.recurrence.reference import Options, Round, Weights

CELLS = tuple(MORE)
# Product libraries may round by where their operands lie in a cache line of 64 bytes. Every 16th
# step of floats lies alike, so that a call rounds the same whether it keeps all its steps or not.
SLOTS = 16


class Saved(NamedTuple):
    """Activations of S steps; optional ones are None where the cell or round has none.

    Of round i: `inner` [S, B, k] (low rank), `gates` [S, B, n] and `targets` [S, B, n], the gated
    x or h. `acts` [S, B, 4H] are the activated i, f, g, o. `px`, `ph`, `m` [S, B, H] are the two
    factors of the mLSTM's m = (W_mx x)(W_mh h), and m.
    """

    inner: tuple[Tensor | None, ...]
    gates: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    acts: Tensor
    px: Tensor | None
    ph: Tensor | None
    m: Tensor | None


def recurrence(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.recurrence`; the mask has no gradient. Raises as `arguments.checked`."""
    if operators.wanted():
        return operators.call("fused", x, h, c, weights, options, state_mask)
    x, h, c, product = checked("fused", x, h, c, weights, state_mask)
    flat = flatten(weights)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, h, c, *flat)):
        output, h, c = _Recurrence.apply(options, product, x, h, c, state_mask, *flat)  # type: ignore[no-untyped-call]
        return output, h, c
    with torch.no_grad(), without_autocast(x.device.type):
        output, cs_SBH, _ = _forward(options, product, x, h, c, state_mask, weights, save=False)
    return output, output[-1].clone(), cs_SBH[(len(x) - 1) % len(cs_SBH)].clone()


def _matrices(w: Weights, cell: str, change: Callable[[Tensor], Tensor]) -> Weights:
    """The weights with each matrix changed; biases as they are."""
    flat = (p if p is None or p.dim() == 1 else change(p) for p in flatten(w))
    return unflatten(tuple(flat), cell)


def _multiply(out: Tensor, source: Tensor, matrix: Tensor, plus: Tensor | None = None) -> Tensor:
    """out = source @ matrix (+ plus, which may be out), the product in the dtype of `matrix`."""
    if matrix.dtype == out.dtype:
        if plus is None:
            return torch.mm(source, matrix, out=out)
        return torch.addmm(plus, source, matrix, out=out)
    result = source.to(matrix.dtype) @ matrix
    return out.copy_(result) if plus is None else torch.add(plus, result, out=out)


def _forward(
    o: Options,
    product: torch.dtype,
    x_TBI: Tensor,
    h: Tensor,
    c: Tensor,
    mask: Tensor | None,
    weights: Weights,
    save: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """output [T, B, H], c' [S, B, H], saved."""
    (T, B, _), H = x_TBI.shape, h.shape[1]
    S = T if save else min(T, SLOTS)
    w = _matrices(weights, o.cell, lambda m: m.to(product).t())  # [source, target]

    def empty(size: int | None) -> Tensor:
        return x_TBI.new_empty(S, B, size or H)

    s = Saved(
        tuple(None if r.right is None else empty(r.right.shape[1]) for r in w.rounds),
        tuple(empty(r.weight.shape[1]) for r in w.rounds),
        tuple(empty(r.weight.shape[1]) for r in w.rounds),
        empty(4 * H),
        *(empty(H) if o.cell == "mlstm" else None for _ in range(3)),
    )
    output_TBH, cs_SBH, h_in = x_TBI.new_empty(T, B, H), empty(H), torch.empty_like(h)
    update, tanh_c, c_in = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h)
    inputs_TB4H = None
    if not w.rounds and o.cell != "rlstm":  # x is not gated: its product waits for no state
        rows = x_TBI.flatten(0, 1)
        inputs_TB4H = _multiply(x_TBI.new_empty(T * B, 4 * H), rows, w.ih, w.bias).view(T, B, 4 * H)
    for t in range(T):
        a = t % S
        m_t = None if mask is None else mask[min(t, mask.shape[0] - 1)]
        x = x0 = x_TBI[t]
        h = h0 = h if m_t is None else torch.mul(h, m_t, out=h_in)
        for k, r in enumerate(w.rounds):
            source = (h if o.zigzag else h0) if k % 2 == 0 else (x if o.zigzag else x0)
            if r.right is not None:
                source = _multiply(s.inner[k][a], source, r.right)  # type: ignore[index]
            gate = _multiply(s.gates[k][a], source, r.weight, r.bias).sigmoid_().mul_(2)
            target = torch.mul(gate, h if k % 2 else x, out=s.targets[k][a])
            x, h = (x, target) if k % 2 else (target, h)
        acts = s.acts[a]
        i, f, g, out = acts.chunk(4, dim=1)
        if o.cell == "rlstm":
            ix, gx = w.ih.chunk(2, dim=1)
            bias = None if w.bias is None else w.bias[: 3 * H]
            _multiply(acts[:, : 3 * H], h, w.hh, bias)
            _multiply(i, x, ix, i).sigmoid_()
            _multiply(g, x, gx, g).tanh_()
            _multiply(f, torch.mul(i, g, out=update), w.more["weight_fu"], f).sigmoid_()
        else:
            if s.m is not None:
                px, ph = s.px[a], s.ph[a]  # type: ignore[index]
                _multiply(px, x, w.more["weight_mx"])
                _multiply(ph, h, w.more["weight_mh"])
                h = torch.mul(px, ph, out=s.m[a])
            plus = _multiply(acts, x, w.ih, w.bias) if inputs_TB4H is None else inputs_TB4H[t]
            _multiply(acts, h, w.hh, plus)
            acts[:, : 2 * H].sigmoid_()
            g.tanh_()
            out.sigmoid_()
        if o.cap_input_gate or o.cell == "rlstm":
            torch.mul(torch.minimum(i, torch.sub(1, f, out=update), out=update), g, out=update)
        else:
            torch.mul(i, g, out=update)
        c = torch.addcmul(update, f, c, out=cs_SBH[a])
        if o.cell == "rlstm":
            masked = c if m_t is None else torch.mul(c, m_t, out=c_in)
            bias = None if w.bias is None else w.bias[3 * H :]
            _multiply(out, masked, w.more["weight_oc"], bias).sigmoid_()
        h = torch.mul(out, torch.tanh(c, out=tanh_c), out=output_TBH[t])
    return output_TBH, cs_SBH, s


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        o: Options,
        product: torch.dtype,
        x_TBI: Tensor,
        h: Tensor,
        c: Tensor,
        mask: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = unflatten(flat, o.cell)
        with without_autocast(x_TBI.device.type):
            output, cs_TBH, s = _forward(o, product, x_TBI, h, c, mask, weights, save=True)
            h_TBH = before(h, output)  # not output itself, which its user may change in place
        ctx.options, ctx.product, ctx.n_rounds = o, product, len(s.gates)
        own = (x_TBI, h, c, mask, h_TBH, cs_TBH, s.acts, s.px, s.ph, s.m)
        ctx.save_for_backward(*own, *s.inner, *s.gates, *s.targets, *flat)
        return output, output[-1].clone(), cs_TBH[-1].clone()

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Any, ...]:
        x_TBI, h, c, mask, h_TBH, cs_TBH, acts, px, ph, m, *rest = ctx.saved_tensors
        n, d_outputs = ctx.n_rounds, (d_output, d_h, d_c)
        if torch.is_grad_enabled():  # the gradients are to be differentiated
            inputs, flat = (x_TBI, h, c), tuple(rest[3 * n :])
            found = twice_differentiable(ctx.options, ctx.product, inputs, mask, flat, d_outputs)
            return None, None, *found[:3], None, *found[3:]
        s = Saved(
            tuple(rest[:n]), tuple(rest[n : 2 * n]), tuple(rest[2 * n : 3 * n]), acts, px, ph, m
        )
        with without_autocast(x_TBI.device.type):
            d_x, d_h, d_c, d_weights = _backward(
                ctx.options,
                ctx.product,
                (x_TBI, c, mask, h_TBH, cs_TBH),
                s,
                unflatten(tuple(rest[3 * n :]), ctx.options.cell),
                d_outputs,
            )
        return None, None, d_x, d_h, d_c, None, *flatten(d_weights)


def _backward(
    o: Options,
    product: torch.dtype,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
    s: Saved,
    weights: Weights,
    d_outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Weights]:
    """Gradients of x, h, c and the weights.

    kernels/README.md derives them. Every local derivative is a factor known before the loop, times
    dc or dh; the loop overwrites the factors by the gradients of the pre-activations, which the
    weight gradients need.
    """
    x_TBI, c, mask, h_TBH, cs_TBH = tensors
    d_out_TBH, d_h, d_c = d_outputs[0], d_outputs[1].clone(), d_outputs[2].clone()
    (T, B, _), H = x_TBI.shape, c.shape[1]
    rlstm = o.cell == "rlstm"
    w = _matrices(weights, o.cell, lambda m: m.to(product))

    c_TBH, f_TBH = before(c, cs_TBH), s.acts[:, :, H : 2 * H]
    if mask is not None:
        h_TBH = h_TBH * mask
    from_h_TBH, d_acts, update_i, update_g, d_gates = _factors(o, s, c_TBH, cs_TBH)
    d_i, d_f, d_g, d_o = d_acts.chunk(4, dim=2)
    d_inner = [None if z is None else torch.empty_like(z) for z in s.inner]
    d_px, d_ph = (None if p is None else torch.empty_like(p) for p in (s.px, s.ph))
    d_x_TBI = torch.empty_like(x_TBI, memory_format=torch.contiguous_format)
    hoisted = not w.rounds and not rlstm and s.m is None
    buffer_h, buffer_c, d_m = torch.empty_like(d_h), torch.empty_like(d_c), torch.empty_like(d_h)

    for t in reversed(range(T)):
        m_t = None if mask is None else mask[min(t, mask.shape[0] - 1)]
        # h' goes to the output and to the next step, c' to h' and to the next step.
        d_h += d_out_TBH[t]
        d_c.addcmul_(d_h, from_h_TBH[t])
        d_o[t].mul_(d_h)
        if rlstm:  # o has seen c', and f the update i g
            d_masked = _multiply(buffer_c, d_o[t], w.more["weight_oc"])
            d_c += d_masked if m_t is None else d_masked.mul_(m_t)
            d_f[t].mul_(d_c)
            d_update = _multiply(buffer_c, d_f[t], w.more["weight_fu"])
            d_i[t].mul_(d_c).addcmul_(d_update, update_i[t])
            d_g[t].mul_(d_c).addcmul_(d_update, update_g[t])
        else:
            d_acts[t, :, : 3 * H].view(B, 3, H).mul_(d_c.unsqueeze(1))
        d_c.mul_(f_TBH[t])

        # Through the products to the gated x and h; in the mLSTM to m, and from it to both.
        d_x = d_x_TBI[t]
        if rlstm:
            _multiply(d_h, d_acts[t, :, : 3 * H], w.hh)
            _multiply(d_x, d_i[t], w.ih[:H])
            _multiply(d_x, d_g[t], w.ih[H:], d_x)
        else:
            if not hoisted:
                _multiply(d_x, d_acts[t], w.ih)
            if d_px is None or d_ph is None:
                _multiply(d_h, d_acts[t], w.hh)
            else:
                _multiply(d_m, d_acts[t], w.hh)
                torch.mul(d_m, s.ph[t], out=d_px[t])  # type: ignore[index]
                torch.mul(d_m, s.px[t], out=d_ph[t])  # type: ignore[index]
                _multiply(d_x, d_px[t], w.more["weight_mx"], d_x)
                _multiply(d_h, d_ph[t], w.more["weight_mh"])

        _through_rounds(o.zigzag, w, s, t, (d_x, d_h), d_gates, d_inner, buffer_h)
        if m_t is not None:
            d_h *= m_t

    if hoisted:
        _multiply(d_x_TBI.flatten(0, 1), d_acts.flatten(0, 1), w.ih)
    d_weights = _weight_gradients(
        o, product, weights, s, (x_TBI, h_TBH, cs_TBH, mask), (d_acts, d_gates, d_inner, d_px, d_ph)
    )
    return d_x_TBI, d_h, d_c, d_weights


def _factors(
    o: Options, s: Saved, c_TBH: Tensor, cs_TBH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Local derivatives of all steps: of c' by h'; of the pre-activations i, f, g, o [T, B, 4H] by
    what reaches c' (o: h'); of i and g by i g; of each round's gate, by what reaches its target."""
    i, f, g, out = s.acts.chunk(4, dim=2)
    tanh_c = cs_TBH.tanh()
    cap = o.cap_input_gate or o.cell == "rlstm"
    share = capped_share(i, f, cap)
    capped = torch.minimum(i, 1 - f) if cap else i
    d_acts = torch.empty_like(s.acts)
    d_i, d_f, d_g, d_o = d_acts.chunk(4, dim=2)
    d_sigmoid_i, d_tanh_g = i * (1 - i), 1 - g * g
    torch.mul(d_sigmoid_i, g * share, out=d_i)
    torch.mul(f * (1 - f), c_TBH - (1 - share) * g, out=d_f)
    torch.mul(d_tanh_g, capped, out=d_g)
    torch.mul(out * (1 - out), tanh_c, out=d_o)
    rlstm = o.cell == "rlstm"
    updates = (d_sigmoid_i * g, d_tanh_g * i) if rlstm else (d_i, d_g)
    # d(2 sigmoid(a) target) / da = 2 sigmoid(a) target (1 - sigmoid(a)), the first two saved.
    d_gates = [
        torch.addcmul(target, target, gate, value=-0.5)
        for target, gate in zip(s.targets, s.gates, strict=True)
    ]
    return (1 - tanh_c * tanh_c) * out, d_acts, *updates, d_gates


def _through_rounds(
    zigzag: bool,
    w: Weights,
    s: Saved,
    t: int,
    d_targets: tuple[Tensor, Tensor],
    d_gates: list[Tensor],
    d_inner: list[Tensor | None],
    buffer_h: Tensor,
) -> None:
    """Turn the gradients of the gated x and h of step t, in place, into those of x and h.

    The last round comes first: its gate times what reaches its target, the rest to its source.
    """
    d_x, d_h = d_targets
    # Without zigzag the sources are the first x and h: what reaches them is added at the end.
    d_h0, d_x0 = (d_h, d_x) if zigzag else (buffer_h.zero_(), torch.zeros_like(d_x))
    for k in reversed(range(len(w.rounds))):
        r, (d_target, d_source) = w.rounds[k], (d_h, d_x0) if k % 2 else (d_x, d_h0)
        d = d_gates[k][t].mul_(d_target)
        d_target.mul_(s.gates[k][t])
        if r.right is not None:
            d = _multiply(d_inner[k][t], d, r.weight)  # type: ignore[index]
        _multiply(d_source, d, r.weight if r.right is None else r.right, d_source)
    if not zigzag:
        d_h += d_h0
        d_x += d_x0


def _weight_gradients(
    o: Options,
    product: torch.dtype,
    weights: Weights,
    s: Saved,
    sources: tuple[Tensor, Tensor, Tensor, Tensor | None],
    d_rows: tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None, Tensor | None],
) -> Weights:
    """One product over all T * B rows each; x, h [T, B, ...] entered the steps, c left them."""
    (x, h, c, mask), (d_acts, d_gates, d_inner, d_px, d_ph) = sources, d_rows
    x0, h0, H = x, h, h.shape[2]
    rounds = []
    for k, r in enumerate(weights.rounds):
        source = (h if o.zigzag else h0) if k % 2 == 0 else (x if o.zigzag else x0)
        d, z, d_z = d_gates[k], s.inner[k], d_inner[k]
        rounds.append(
            Round(
                gradients(d, source if z is None else z, product),
                None if d_z is None else gradients(d_z, source, product),
                None if r.bias is None else d.sum((0, 1)),
            )
        )
        x, h = (x, s.targets[k]) if k % 2 else (s.targets[k], h)
    d_bias = None if weights.bias is None else d_acts.sum((0, 1))
    if o.cell == "rlstm":
        d_i, d_f, d_g, d_o = d_acts.chunk(4, dim=2)
        return Weights(
            torch.cat([gradients(d, x, product) for d in (d_i, d_g)]),
            gradients(d_acts[..., : 3 * H], h, product),
            d_bias,
            tuple(rounds),
            {
                "weight_fu": gradients(d_f, s.acts[..., :H] * s.acts[..., 2 * H : 3 * H], product),
                "weight_oc": gradients(d_o, c if mask is None else c * mask, product),
            },
        )
    more = {}
    if d_px is not None and d_ph is not None:
        more = {"weight_mx": gradients(d_px, x, product), "weight_mh": gradients(d_ph, h, product)}
    return Weights(
        gradients(d_acts, x, product),
        gradients(d_acts, h if s.m is None else s.m, product),
        d_bias,
        tuple(rounds),
        more,
    )
