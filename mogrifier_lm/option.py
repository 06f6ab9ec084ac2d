"""How an option is said: its default, what it does, what it may be, and its source."""

import math
from dataclasses import dataclass, field
from typing import Any

# Sources.
AWD, MOGRIFIER, REWIRED = "arXiv 1708.02182", "arXiv 1909.01792", "arXiv 2211.01848"
LAMB, DYNAMIC, CACHE = "LAMB", "arXiv 1709.07432", "arXiv 1612.04426"


@dataclass(frozen=True)
class Interval:
    """What a number may be; both ends are always given."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def missed(self, value: Any) -> str | None:
        """What a value is not but must be, "at least 1" say; None inside the interval."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.least:
            return f"at least {self.least}"
        if value <= self.above:
            return f"above {self.above}"
        if value > self.most:
            return f"at most {self.most}"
        return f"below {self.below}" if value >= self.below else None


# The ends of the first two only bound arithmetic: memory says no much earlier, see `runs.build`.
SIZE, COUNT = Interval(1, 10**7), Interval(1, 10**12)
PARTS = Interval(1, 1000)  # of what multiplies a step's work: with more it would take minutes
RATE, SEED = Interval(0, below=1), Interval(0, below=2**32)
SHARE, FACTOR = Interval(above=0, most=1), Interval(0, 1e3)
TEMPERATURE = Interval(1e-3, 1e3)


def option(
    default: Any, doc: str, values: Interval | tuple[str, ...] | None = None, paper: str = ""
) -> Any:
    """A dataclass field with its documentation, what it may be, and its source.

    Every number has an interval; that of a list is of its values. Of texts there may be a choice.
    """
    metadata = {"doc": doc, "values": values, "paper": paper}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
