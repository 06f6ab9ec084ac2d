"""Word-level language modelling with the Mogrifier LSTM."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["MogrifierLSTM", "load_model"]


def __getattr__(name: str) -> Any:
    # torch is imported when it is first needed, so that `train.py --help` answers at once.
    if name == "MogrifierLSTM":
        from mogrifier_lm.cells import MogrifierLSTM

        return MogrifierLSTM
    if name == "load_model":
        from mogrifier_lm.inference.trained import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
