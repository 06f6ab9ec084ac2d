"""Recurrent layers that own parameters."""

from mogrifier_lm.cells.layer import RecurrentLayer, State
from mogrifier_lm.cells.mogrifier_lstm import MogrifierLSTM
from mogrifier_lm.cells.spec import CellSpec

__all__ = ["CellSpec", "MogrifierLSTM", "RecurrentLayer", "State"]
