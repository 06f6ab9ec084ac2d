"""The multiplicative LSTM (Krause et al., arXiv 1609.07959)."""

from torch import Tensor
from torch.nn.functional import linear

from mogrifier_lm.cells import lstm
from mogrifier_lm.cells.cell import Cell
from mogrifier_lm.kernels.recurrence import Options, State, Weights


def step(x: Tensor, state: State, w: Weights, options: Options, mask: Tensor | None) -> State:
    """The LSTM with m = (W_mx x)(W_mh h) in the place of h."""
    h, c = state
    m = linear(x, w.more["weight_mx"]) * linear(h, w.more["weight_mh"])
    return lstm.step(x, (m, c), w, options, mask)


def shapes(n_in: int, n: int) -> dict[str, tuple[int, ...]]:
    return {**lstm.shapes(n_in, n), "weight_mx": (n, n_in), "weight_mh": (n, n)}


MLSTM = Cell(step, shapes, chrono_=lstm.chrono_)
