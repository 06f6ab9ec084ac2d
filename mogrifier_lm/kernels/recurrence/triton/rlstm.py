"""The kernels of the RLSTM's step, of which three products stand one behind the other.

Its weights are laid out as the LSTM's, with zeros where x does not reach f and nothing reaches o
(`w` [4H, IN + H]), so that its inputs and their gradients go the LSTM's way; the places of o in
`acts` and `d_acts` hold zeros. Conventions and legend as in `kernels`.
"""

import triton
import triton.language as tl

from mogrifier_lm.kernels.recurrence.triton.kernels import (
    accumulate,
    cap_share,
    enter,
    join_units,
    split_units,
    store_h,
    tanh,
)


@triton.jit
def update(
    x,
    h,
    w,
    bias,
    acts,
    out,
    B,
    IN: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """i, g, and what f takes of h; out [B, H] = i g."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.program_id(0) * 4 * BU + tl.arange(0, 4 * BU)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    W: tl.constexpr = IN + H
    acc = tl.zeros((BM, 4 * BU), tl.float32)
    acc = accumulate(acc, x, w, m, rows, B, 4 * H, IN, IN, W, 1, BK, PRECISION)
    acc = accumulate(acc, h, w + IN, m, rows, B, 4 * H, H, H, W, 1, BK, PRECISION)
    acc += tl.load(bias + rows, rows < 4 * H, other=0.0)[None, :]
    i, f, g, o = split_units(acc, BM, BU)
    i, g = tl.sigmoid(i), tanh(g)
    tl.store(
        acts + m[:, None] * 4 * H + rows[None, :],
        join_units(i, f, g, tl.zeros((BM, BU), tl.float32), BM, BU).to(acts.dtype.element_ty),
        (m[:, None] < B) & (rows[None, :] < 4 * H),
    )
    tl.store(
        out + m[:, None] * H + n[None, :],
        (i * g).to(out.dtype.element_ty),
        (m[:, None] < B) & (n[None, :] < H),
    )


@triton.jit
def forget(
    u,
    w,
    acts,
    c,
    mask,
    c_out,
    c_masked,
    B,
    H: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """f, with the update u [B, H] through w [H, H], and the new c; i is capped at 1 - f."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    rows = tl.program_id(0) * 4 * BU + tl.arange(0, 4 * BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    ok4 = (m[:, None] < B) & (rows[None, :] < 4 * H)
    places = m[:, None] * H + n[None, :]
    places4 = m[:, None] * 4 * H + rows[None, :]
    i, f, g, o = split_units(tl.load(acts + places4, ok4, other=0.0).to(tl.float32), BM, BU)
    acc = tl.zeros((BM, BU), tl.float32)
    f = tl.sigmoid(f + accumulate(acc, u, w, m, n, B, H, H, H, H, 1, BK, PRECISION))
    tl.store(acts + places4, join_units(i, f, g, o, BM, BU).to(acts.dtype.element_ty), ok4)
    new = f * tl.load(c + places, ok, other=0.0) + tl.minimum(i, 1 - f) * g
    store_h(new, c_out, c_masked, mask, places, ok, MASKED)


@triton.jit
def output(
    c_masked,
    w,
    bias,
    c,
    mask,
    gates,
    out,
    h_next,
    B,
    H: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """o, stored in gates [B, H], sees the masked c through w [H, H]; h = o tanh(c)."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    places = m[:, None] * H + n[None, :]
    acc = tl.zeros((BM, BU), tl.float32)
    acc = accumulate(acc, c_masked, w, m, n, B, H, H, H, H, 1, BK, PRECISION)
    o = tl.sigmoid(acc + tl.load(bias + n, n < H, other=0.0)[None, :])
    tl.store(gates + places, o.to(gates.dtype.element_ty), ok)
    value = o * tanh(tl.load(c + places, ok, other=0.0))
    store_h(value, out, h_next, mask, places, ok, MASKED)


@triton.jit
def output_backward(
    d_out,
    d_h,
    d_c,
    gates,
    c,
    d_o,
    B,
    H: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """d_o [B, H], of what the sigmoid takes, and what reaches c not through o, added to d_c."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    places = m[:, None] * H + n[None, :]
    dh = tl.load(d_out + places, ok, other=0.0) + tl.load(d_h + places, ok, other=0.0)
    o = tl.load(gates + places, ok, other=0.0).to(tl.float32)
    t = tanh(tl.load(c + places, ok, other=0.0))
    tl.store(d_o + places, (dh * t * o * (1 - o)).to(d_o.dtype.element_ty), ok)
    tl.store(d_c + places, tl.load(d_c + places, ok, other=0.0) + dh * o * (1 - t * t), ok)


@triton.jit
def forget_backward(
    d_o,
    w,
    d_c,
    mask,
    acts,
    c,
    d_f,
    B,
    H: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """d_c += what comes through o; d_f [B, H], of what the sigmoid takes; c is the former one."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    rows = tl.program_id(0) * 4 * BU + tl.arange(0, 4 * BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    ok4 = (m[:, None] < B) & (rows[None, :] < 4 * H)
    places = m[:, None] * H + n[None, :]
    tile = tl.load(acts + m[:, None] * 4 * H + rows[None, :], ok4, other=0.0).to(tl.float32)
    i, f, g, o = split_units(tile, BM, BU)
    acc = tl.zeros((BM, BU), tl.float32)
    acc = accumulate(acc, d_o, w, m, n, B, H, H, H, 1, H, BK, PRECISION)
    if MASKED:
        acc *= tl.load(mask + places, ok, other=0.0)
    dc = tl.load(d_c + places, ok, other=0.0) + acc
    tl.store(d_c + places, dc, ok)
    capped, share = cap_share(i, f, True)
    df = dc * (tl.load(c + places, ok, other=0.0) - (1 - share) * g) * f * (1 - f)
    tl.store(d_f + places, df.to(d_f.dtype.element_ty), ok)


@triton.jit
def update_backward(
    d_f,
    w,
    d_c,
    acts,
    d_acts,
    B,
    H: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """d_acts [B, 4H], with what comes through f; d_c becomes that of the former c."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    rows = tl.program_id(0) * 4 * BU + tl.arange(0, 4 * BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    ok4 = (m[:, None] < B) & (rows[None, :] < 4 * H)
    places = m[:, None] * H + n[None, :]
    places4 = m[:, None] * 4 * H + rows[None, :]
    i, f, g, o = split_units(tl.load(acts + places4, ok4, other=0.0).to(tl.float32), BM, BU)
    du = tl.zeros((BM, BU), tl.float32)
    du = accumulate(du, d_f, w, m, n, B, H, H, H, 1, H, BK, PRECISION)
    dc = tl.load(d_c + places, ok, other=0.0)
    capped, share = cap_share(i, f, True)
    d_i = (dc * share + du) * g * i * (1 - i)
    d_g = (dc * capped + du * i) * (1 - g * g)
    df = tl.load(d_f + places, ok, other=0.0).to(tl.float32)
    tile = join_units(d_i, df, d_g, tl.zeros((BM, BU), tl.float32), BM, BU)
    tl.store(d_acts + places4, tile.to(d_acts.dtype.element_ty), ok4)
    tl.store(d_c + places, dc * f, ok)
