"""What a file of a cell says."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mogrifier_lm.kernels.recurrence import Step


@dataclass(frozen=True)
class Cell:
    """One kind of cell; rounds of mogrification may stand in front of any.

    Args:
        step: one step in time, a pure function, see `kernels.recurrence.Step`.
        shapes: (I, H) → parameter name → shape: `weight_ih` and `weight_hh` first; what begins with
            "bias" is left out of a layer without biases.
        state: names of the tensors [B, H] that a step takes and returns; the first is the output,
            which gates x and is gated by it.
        chrono_: writes Chrono initial values for a longest memory of T_max steps into `bias`
            (arXiv 1804.11188); None: the cell has no gates that they are for.
    """

    step: Step
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    state: tuple[str, ...] = ("h", "c")
    chrono_: Callable[[Tensor, float], None] | None = None
