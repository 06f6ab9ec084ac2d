"""The steps of the recurrences as Triton kernels: small products with what follows them fused in.

Every feature size is padded with zeros to a multiple of `ALIGN`, so that rows begin on whole
vectors; zeros stay zeros through every kernel, forward and backward. The four gates of a unit lie
side by side (i, f, g, o), in the rows of the weights as in the columns of activations: a program
then holds whole units.

Operands of products have the dtype of their buffers, sums and states are fp32. No program adds to
what another one writes: the order of every sum is fixed.

Legend: B streams, IN inputs, H units, N columns of the result, K columns that a product sums over;
BM, BN, BK the blocks of B, N, K, BU the units of a block.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ALIGN = 32


@triton.jit
def enter(EARLY: tl.constexpr):
    """With EARLY, which Hopper and later have, a kernel is brought in while the last one runs.

    It waits here for what that one writes; then the next one may come, never a third.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def accumulate(
    acc,
    a,
    w,
    m,
    n,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    A_M: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + a[m] @ w[n].T; rows of a are A_M apart, those of w W_N, its columns W_K."""
    if acc.shape[0] == 1:  # one stream: no product of blocks, which would take 16
        BN: tl.constexpr = acc.shape[1]
        part = tl.zeros((BK, BN), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            row = tl.load(a + k, k < K, other=0.0).to(tl.float32)
            columns = tl.load(
                w + n[None, :] * W_N + k[:, None] * W_K,
                (n[None, :] < N) & (k[:, None] < K),
                other=0.0,
            )
            part += row[:, None] * columns.to(tl.float32)
        acc += tl.sum(part, 0)[None, :]
    else:
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            rows = tl.load(
                a + m[:, None] * A_M + k[None, :], (m[:, None] < B) & (k[None, :] < K), other=0.0
            )
            columns = tl.load(
                w + n[None, :] * W_N + k[:, None] * W_K,
                (n[None, :] < N) & (k[:, None] < K),
                other=0.0,
            )
            acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
    return acc


@triton.jit
def multiply(
    a,
    w,
    out,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [B, N] = a [B, K] @ w.T."""
    enter(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = accumulate(acc, a, w, m, n, B, N, K, K, W_N, W_K, BK, PRECISION)
    tl.store(
        out + m[:, None] * N + n[None, :],
        acc.to(out.dtype.element_ty),
        (m[:, None] < B) & (n[None, :] < N),
    )


@triton.jit
def gate(
    source,
    w,
    bias,
    target,
    gates,
    out,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A round: gates [B, N] = 2 sigmoid(source [B, K] @ w.T + bias), out = gates * target."""
    enter(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (m[:, None] < B) & (n[None, :] < N)
    places = m[:, None] * N + n[None, :]
    t = tl.load(target + places, ok, other=0.0).to(tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = accumulate(acc, source, w, m, n, B, N, K, K, K, 1, BK, PRECISION)
    g = 2 * tl.sigmoid(acc + tl.load(bias + n, n < N, other=0.0)[None, :])
    tl.store(gates + places, g.to(gates.dtype.element_ty), ok)
    tl.store(out + places, (g * t).to(out.dtype.element_ty), ok)


@triton.jit
def multiplicative(
    x,
    h,
    w_x,
    w_h,
    px,
    ph,
    out,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The mLSTM's m [B, N] = px * ph, px = x [B, K] @ w_x.T, ph = h [B, N] @ w_h.T."""
    enter(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (m[:, None] < B) & (n[None, :] < N)
    places = m[:, None] * N + n[None, :]
    a = tl.zeros((BM, BN), tl.float32)
    b = tl.zeros((BM, BN), tl.float32)
    a = accumulate(a, x, w_x, m, n, B, N, K, K, K, 1, BK, PRECISION)
    b = accumulate(b, h, w_h, m, n, B, N, N, N, N, 1, BK, PRECISION)
    tl.store(px + places, a.to(px.dtype.element_ty), ok)
    tl.store(ph + places, b.to(ph.dtype.element_ty), ok)
    tl.store(out + places, (a * b).to(out.dtype.element_ty), ok)


@triton.jit
def split_units(tile, BM: tl.constexpr, BU: tl.constexpr):
    """i, f, g, o [BM, BU] of a tile [BM, 4 BU]."""
    ig, fo = tl.split(tl.reshape(tile, (BM, BU, 2, 2)))
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o


@triton.jit
def join_units(i, f, g, o, BM: tl.constexpr, BU: tl.constexpr):
    return tl.reshape(tl.join(tl.join(i, g), tl.join(f, o)), (BM, 4 * BU))


@triton.jit
def store_h(value, out, h_next, mask, places, ok, MASKED: tl.constexpr):
    """The output, and in the dtype of products the h that the next step sees."""
    tl.store(out + places, value, ok)
    if MASKED:
        value *= tl.load(mask + places, ok, other=0.0)
    tl.store(h_next + places, value.to(h_next.dtype.element_ty), ok)


@triton.jit
def lstm(
    x,
    h,
    w,
    bias,
    c,
    mask,
    acts,
    c_out,
    out,
    h_next,
    B,
    IN: tl.constexpr,
    H: tl.constexpr,
    BEFORE: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A step of the LSTM, w [4H, IN + H]; with BEFORE, x [B, 4H] has been multiplied already."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.program_id(0) * 4 * BU + tl.arange(0, 4 * BU)
    ok4 = (m[:, None] < B) & (rows[None, :] < 4 * H)
    places4 = m[:, None] * 4 * H + rows[None, :]
    W: tl.constexpr = IN + H
    if BEFORE:
        acc = tl.load(x + places4, ok4, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BM, 4 * BU), tl.float32)
        acc = accumulate(acc, x, w, m, rows, B, 4 * H, IN, IN, W, 1, BK, PRECISION)
    acc = accumulate(acc, h, w + IN, m, rows, B, 4 * H, H, H, W, 1, BK, PRECISION)
    acc += tl.load(bias + rows, rows < 4 * H, other=0.0)[None, :]
    i, f, g, o = split_units(acc, BM, BU)
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), tanh(g), tl.sigmoid(o)
    tl.store(acts + places4, join_units(i, f, g, o, BM, BU).to(acts.dtype.element_ty), ok4)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    places = m[:, None] * H + n[None, :]
    if CAP:
        i = tl.minimum(i, 1 - f)
    new = f * tl.load(c + places, ok, other=0.0) + i * g
    tl.store(c_out + places, new, ok)
    store_h(o * tanh(new), out, h_next, mask, places, ok, MASKED)


@triton.jit
def cap_share(i, f, CAP: tl.constexpr):
    """min(i, 1 - f) and what of its gradient goes to i: half at ties, as torch.minimum's."""
    if CAP:
        rest = 1 - f
        share = tl.where(i < rest, 1.0, tl.where(i == rest, 0.5, 0.0))
        return tl.minimum(i, rest), share
    else:
        return i, 1.0


@triton.jit
def lstm_backward(
    d_out,
    d_h,
    d_c,
    acts,
    c,
    c_new,
    d_acts,
    B,
    H: tl.constexpr,
    CAP: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """d_acts [B, 4H], of what the sigmoids and the tanh take; d_c [B, H] in its place."""
    enter(EARLY)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BU + tl.arange(0, BU)
    rows = tl.program_id(0) * 4 * BU + tl.arange(0, 4 * BU)
    ok = (m[:, None] < B) & (n[None, :] < H)
    ok4 = (m[:, None] < B) & (rows[None, :] < 4 * H)
    places = m[:, None] * H + n[None, :]
    places4 = m[:, None] * 4 * H + rows[None, :]
    tile = tl.load(acts + places4, ok4, other=0.0).to(tl.float32)
    i, f, g, o = split_units(tile, BM, BU)
    dh = tl.load(d_out + places, ok, other=0.0) + tl.load(d_h + places, ok, other=0.0)
    t = tanh(tl.load(c_new + places, ok, other=0.0))
    dc = tl.load(d_c + places, ok, other=0.0) + dh * o * (1 - t * t)
    capped, share = cap_share(i, f, CAP)
    d_i = dc * g * share * i * (1 - i)
    d_f = dc * (tl.load(c + places, ok, other=0.0) - (1 - share) * g) * f * (1 - f)
    d_g = dc * capped * (1 - g * g)
    d_o = dh * t * o * (1 - o)
    tile = join_units(d_i, d_f, d_g, d_o, BM, BU)
    tl.store(d_acts + places4, tile.to(d_acts.dtype.element_ty), ok4)
    tl.store(d_c + places, dc * f, ok)


@triton.jit
def store_gradient(
    d, gates, targets, d_gates, out, mask, places, ok, GATED: tl.constexpr, MASKED: tl.constexpr
):
    """d of what a round made, given to its gate and through it; with MASKED, d of a masked h.

    d(2 sigmoid(a) t) / da = 2 sigmoid(a) t (1 - sigmoid(a)), the first two saved as `targets`.
    """
    if GATED:
        g = tl.load(gates + places, ok, other=0.0).to(tl.float32)
        made = tl.load(targets + places, ok, other=0.0).to(tl.float32)
        tl.store(d_gates + places, (d * made * (1 - 0.5 * g)).to(d_gates.dtype.element_ty), ok)
        d *= g
    if MASKED:
        d *= tl.load(mask + places, ok, other=0.0)
    tl.store(out + places, d, ok)


@triton.jit
def inputs_backward(
    d_acts,
    w,
    d_x,
    d_h,
    gates,
    targets,
    d_gates,
    mask,
    B,
    IN: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    GATED_X: tl.constexpr,
    GATED_H: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """d_x [B, IN], d_h [B, H] = d_acts [B, K] @ w [K, IN + H], and on through the last round.

    The programs begin at column FIRST (0, or IN for h alone). BN divides IN, so that a block holds
    columns of x or of h.
    """
    enter(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    start = FIRST + tl.program_id(1) * BN
    n = start + tl.arange(0, BN)
    W: tl.constexpr = IN + H
    acc = tl.zeros((BM, BN), tl.float32)
    acc = accumulate(acc, d_acts, w, m, n, B, W, K, K, 1, W, BK, PRECISION)
    if start < IN:
        ok = (m[:, None] < B) & (n[None, :] < IN)
        places = m[:, None] * IN + n[None, :]
        store_gradient(acc, gates, targets, d_gates, d_x, mask, places, ok, GATED_X, False)
    else:
        ok = (m[:, None] < B) & (n[None, :] < W)
        places = m[:, None] * H + (n - IN)[None, :]
        store_gradient(acc, gates, targets, d_gates, d_h, mask, places, ok, GATED_H, MASKED)


@triton.jit
def source_backward(
    d,
    w,
    d_source,
    gates,
    targets,
    d_gates,
    mask,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """d_source [B, N] += d [B, K] @ w [K, N], and on through the round that made the source."""
    enter(EARLY)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (m[:, None] < B) & (n[None, :] < N)
    places = m[:, None] * N + n[None, :]
    acc = tl.load(d_source + places, ok, other=0.0)
    acc = accumulate(acc, d, w, m, n, B, N, K, K, 1, N, BK, PRECISION)
    store_gradient(acc, gates, targets, d_gates, d_source, mask, places, ok, GATED, MASKED)
