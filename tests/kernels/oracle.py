"""The recurrences in float64 NumPy, written from the papers' formulas and sharing no code.

Mogrifier LSTM: arXiv 1909.01792; mLSTM: arXiv 1609.07959; RLSTM: arXiv 2211.01848.
"""

import numpy as np
from numpy import ndarray


def sigma(a: ndarray) -> ndarray:
    return 1 / (1 + np.exp(-a))


def round_matrix(p: dict[str, ndarray], k: int) -> ndarray:
    if f"round{k}_weight" in p:
        return p[f"round{k}_weight"]
    return p[f"round{k}_left"] @ p[f"round{k}_right"]


def mogrify(p, x, h, rounds, shared, zigzag):
    xs, hs = {-1: x}, {0: h}  # x^i for odd i, h^i for even i
    for i in range(1, rounds + 1):
        k = (1 if i % 2 else 2) if shared else i
        condition = (hs if i % 2 else xs)[i - 1 if zigzag else (0 if i % 2 else -1)]
        bias = p.get(f"round{k}_bias", 0)
        # Columns are batch entries, as in the papers: W v.
        gate = 2 * sigma((round_matrix(p, k) @ condition.T).T + bias)
        if i % 2:
            xs[i] = gate * xs[i - 2]
        else:
            hs[i] = gate * hs[i - 2]
    return xs[max(xs)], hs[max(hs)]


def step(p, cell, x, h, c, cap, mask):
    size = h.shape[1]
    b = np.split(p.get("bias", np.zeros(4 * size)), 4)
    if cell == "rlstm":
        w_ix, w_jx = np.split(p["weight_ih"], 2)
        w_ih, w_fh, w_jh = np.split(p["weight_hh"], 3)
        i = sigma(x @ w_ix.T + h @ w_ih.T + b[0])
        j = np.tanh(x @ w_jx.T + h @ w_jh.T + b[2])
        f = sigma((i * j) @ p["weight_fu"].T + h @ w_fh.T + b[1])
        c = f * c + np.minimum(i, 1 - f) * j
        o = sigma((c * mask) @ p["weight_oc"].T + b[3])
        return o * np.tanh(c), c
    if cell == "mlstm":
        h = (x @ p["weight_mx"].T) * (h @ p["weight_mh"].T)
    w_x, w_h = np.split(p["weight_ih"], 4), np.split(p["weight_hh"], 4)
    i, f, j, o = (x @ w_x[k].T + h @ w_h[k].T + b[k] for k in range(4))
    i, f, j, o = sigma(i), sigma(f), np.tanh(j), sigma(o)
    c = f * c + (np.minimum(1 - f, i) if cap else i) * j
    return o * np.tanh(c), c


def recurrence(p, x, h, c, mask, *, cell, rounds, shared, zigzag, cap):
    """p: parameter name → array, named as by CellSpec.shapes; mask [1 or T, B, H] or None."""
    outputs = []
    for t, x_t in enumerate(x):
        m = np.ones_like(h) if mask is None else mask[t if len(mask) > 1 else 0]
        x_t, h = mogrify(p, x_t, h * m, rounds, shared, zigzag)
        h, c = step(p, cell, x_t, h, c, cap, m)
        outputs.append(h)
    return np.stack(outputs), h, c
