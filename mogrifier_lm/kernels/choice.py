"""Which of several kernels runs: the fastest on a device, or the one that is asked for."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

FASTEST = {"cpu": "native", "cuda": "triton"}


def choose(
    asked: str,
    device: str | torch.device,
    plain: Sequence[str],
    unsupported: Mapping[str, Callable[[], str | None]],
    what: str,
) -> str:
    """The name of the kernel that runs.

    Args:
        asked: "auto", or a name.
        device: of the parameters, as torch.device takes it.
        plain: names of those that run anywhere, in torch operations; the last is the fastest.
        unsupported: name of another → why it cannot run here; None: it can.
        what: it computes, for the log.

    Raises:
        ValueError: an unknown name, or a kernel that cannot run here, with the reason.
    """
    if asked not in ("auto", *plain, *unsupported):
        known = ", ".join((*plain, *unsupported))
        raise ValueError(f"backend is {asked!r}, it must be one of auto, {known}")
    if asked in plain:
        return asked
    kind = torch.device(device).type
    name = FASTEST.get(kind, "triton") if asked == "auto" else asked
    reason = unsupported[name]()
    if reason is None:
        return name
    if asked != "auto":
        raise ValueError(f"backend is {asked}: {reason}")
    if kind in FASTEST:
        _say(what, plain[-1], reason)
    return plain[-1]


@functools.cache  # once for each reason
def _say(what: str, name: str, reason: str) -> None:
    logging.getLogger(__name__).info("%s runs in torch operations (%s): %s", what, name, reason)
