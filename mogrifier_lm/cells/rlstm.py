"""The rewired LSTM (Melis, arXiv 2211.01848): seven matrices in the place of eight."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from mogrifier_lm.cells import lstm
from mogrifier_lm.cells.cell import Cell
from mogrifier_lm.kernels.recurrence import Options, State, Weights


def step(x: Tensor, state: State, w: Weights, options: Options, mask: Tensor | None) -> State:
    """f sees the update i * g in place of x, o sees the masked c' alone; i is at most 1 - f."""
    h, c = state
    ix, gx = linear(x, w.ih).chunk(2, dim=1)
    ih, fh, gh = linear(h, w.hh).chunk(3, dim=1)
    bi, bf, bg, bo = (0, 0, 0, 0) if w.bias is None else w.bias.chunk(4)
    i, g = torch.sigmoid(ix + ih + bi), torch.tanh(gx + gh + bg)
    f = torch.sigmoid(linear(i * g, w.more["weight_fu"]) + fh + bf)
    c = f * c + torch.minimum(i, 1 - f) * g
    o = torch.sigmoid(linear(c if mask is None else c * mask, w.more["weight_oc"]) + bo)
    return o * torch.tanh(c), c


def shapes(n_in: int, n: int) -> dict[str, tuple[int, ...]]:
    """`weight_ih` is for i, g and `weight_hh` for i, f, g; `bias` for i, f, g, o."""
    return {
        "weight_ih": (2 * n, n_in),
        "weight_hh": (3 * n, n),
        "bias": (4 * n,),
        "weight_fu": (n, n),
        "weight_oc": (n, n),
    }


RLSTM = Cell(step, shapes, chrono_=lstm.chrono_)
