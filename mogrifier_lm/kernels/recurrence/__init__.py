"""Recurrences over time: the reference and its fast siblings, one signature."""

from collections.abc import Callable
from typing import Any

from mogrifier_lm.kernels.recurrence import fused, reference

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.recurrence,
    "fused": fused.recurrence,
}


def resolve(backend: str, device: str) -> str:
    """The name of the backend that runs: `auto` is the fastest one that can run on `device`.

    Raises:
        ValueError: an unknown backend, or one that cannot run here, with the reason.
    """
    if backend == "auto":
        return "fused"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of auto, {', '.join(BACKENDS)}")
    return backend
