"""Where training stands, how far that is and goes next, and the time it took."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from mogrifier_lm.data import Streams
from mogrifier_lm.options import TrainerConfig


@dataclass
class Progress:
    """Where training stands; plain values, saved with each checkpoint."""

    epoch: int = 0  # passes begun before this one
    position: int = 0  # time steps of this pass that are done
    step: int = 0  # windows done in all
    tokens: int = 0  # targets trained on in all
    seconds: float = 0.0  # spent, validation included, over all parts of a resumed run
    pause_seconds: float = 0.0  # the part spent on validations and checkpoints
    best_ppl: float = math.inf  # per word, or where words are no unit per token
    best_step: int = 0
    since_best: int = 0  # validations
    since_drop: int = 0  # validations without improvement since the last drop of the rate
    metrics_bytes: int = 0  # length of the log of metrics
    finished: str | None = None  # why training ended

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """That of a checkpoint, which has not ended: a resumed run may be given further limits.

        Raises:
            ValueError: values that training has not left.
        """
        progress = cls(**{k: v for k, v in values.items() if k in vars(cls()) and k != "finished"})
        for name, default in vars(cls()).items():
            value = getattr(progress, name)
            kinds = int if isinstance(default, int) else (int, float)
            if name != "finished" and not (isinstance(value, kinds) and 0 <= value):
                raise ValueError(f"{name} is {value}")
        if not progress.pause_seconds <= progress.seconds < math.inf:
            raise ValueError(f"seconds is {progress.seconds}")
        return progress

    @property
    def training_seconds(self) -> float:
        return self.seconds - self.pause_seconds

    def pause(self, seconds: float) -> None:
        """Take time that passed without training into account."""
        self.seconds += seconds
        self.pause_seconds += seconds

    def share_done(self, config: TrainerConfig, pass_steps: int) -> float:
        """Of the training that max_steps or max_epochs sets, in [0, 1].

        Args:
            config: sets them.
            pass_steps: time steps of a pass.
        """
        epochs = self.epoch + self.position / pass_steps
        return max(
            self.step / config.max_steps if config.max_steps else 0.0,
            epochs / config.max_epochs if config.max_epochs else 0.0,
        )

    def why_ended(self, config: TrainerConfig) -> str | None:
        """Which limit is reached; None where training goes on."""
        if config.max_steps is not None and self.step >= config.max_steps:
            return f"{self.step} steps"
        if config.max_epochs is not None and self.epoch >= config.max_epochs:
            return f"{self.epoch} epochs"
        if config.max_minutes is not None and self.seconds >= 60 * config.max_minutes:
            return f"{self.seconds / 60:.1f} minutes"
        if config.early_stop is not None and self.since_best >= config.early_stop:
            return f"no improvement in {self.since_best} validations"
        return None


def total_steps(train: Streams, config: TrainerConfig) -> int | None:
    """Steps until max_steps or max_epochs, about; None when only time ends."""
    by_epochs = config.max_epochs and config.max_epochs * math.ceil(train.num_steps / config.bptt)
    return min(filter(None, (config.max_steps, by_epochs)), default=None)


def window_length(config: TrainerConfig, generator: torch.Generator) -> int:
    """Time steps of the next window (variable lengths: AWD-LSTM's main.py)."""
    if not config.variable_bptt:
        return config.bptt
    full = torch.rand((), generator=generator) < 0.95
    noise = 5 * torch.randn((), generator=generator)
    return max(5, int((config.bptt if full else config.bptt / 2) + noise))


class Stopwatch:
    """Divides time into laps, without a gap between them.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last = clock, clock()

    def lap(self) -> float:
        """Seconds since the last lap ended, or since the watch was made."""
        began, self._last = self._last, self._clock()
        return self._last - began
