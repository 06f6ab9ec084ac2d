"""Word-level language modelling with the Mogrifier LSTM."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["MogrifierLSTM", "load_model", "read_sweep"]

# Name → its module: torch is imported when it is first needed, so that `train.py --help` answers
# at once.
_MODULES = {
    "MogrifierLSTM": "library.drop_in",
    "load_model": "inference.trained",
    "read_sweep": "reports.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
