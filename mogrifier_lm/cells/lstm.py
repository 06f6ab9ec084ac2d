"""The LSTM, with the input gate capped if wanted (as in the Mogrifier's released code)."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from mogrifier_lm.cells.cell import Cell
from mogrifier_lm.kernels.recurrence import Options, State, Weights


def step(x: Tensor, state: State, w: Weights, options: Options, mask: Tensor | None) -> State:
    """c' = f c + i g, h' = o tanh(c'); with the cap, i is at most 1 - f, so that |c| <= 1."""
    h, c = state
    i, f, g, o = (linear(x, w.ih, w.bias) + linear(h, w.hh)).chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + (torch.minimum(i, 1 - f) if options.cap_input_gate else i) * g
    return o * torch.tanh(c), c


def shapes(n_in: int, n: int) -> dict[str, tuple[int, ...]]:
    """Gates are stacked in the order i, f, g, o, as in torch.nn.LSTM."""
    return {"weight_ih": (4 * n, n_in), "weight_hh": (4 * n, n), "bias": (4 * n,)}


def chrono_(bias: Tensor, t_max: float) -> None:
    """Forget biases ln U(1, T_max - 1), input biases their negative (arXiv 1804.11188, eq. 16)."""
    i, f, _, _ = bias.chunk(4)
    f.uniform_(1, t_max - 1).log_()
    i.copy_(-f)


LSTM = Cell(step, shapes, chrono_=chrono_)
