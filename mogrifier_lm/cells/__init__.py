"""Recurrent layers that own parameters."""

from mogrifier_lm.cells.layer import RecurrentLayer
from mogrifier_lm.cells.spec import CELLS, CellSpec
from mogrifier_lm.kernels.recurrence import State

__all__ = ["CELLS", "CellSpec", "RecurrentLayer", "State"]
