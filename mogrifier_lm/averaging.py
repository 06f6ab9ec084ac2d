"""Averages of the weights over training: evaluation sees the average, training goes on raw.

One interface for every rule (`RULES`). The trainer calls `update` after each optimizer step; at a
validation it scores every one of `candidates`, hands the perplexities to `validated` and evaluates
from there with the candidate that this names:

    candidates = averaging.candidates()
    for name, weights in candidates.items():
        with swapped(averaging, weights):
            ppl[name] = ...
    chosen = averaging.validated(ppl, step)  # ppl[chosen] is the score of candidates[chosen]

The averages are kept beside the parameters, one copy of the weights for each.
"""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WORST = sys.float_info.max


def _finite(ppl: float) -> float:
    """The perplexity; the largest float for infinity and NaN, so that it compares, in JSON too."""
    return ppl if ppl < WORST else WORST


class Mean:
    """A running mean of weights: arithmetic, or exponential with the bias corrected.

    After t additions, mean = Σ decay^(t-i) w_i / Σ decay^(t-i); decay 1 weighs all alike. In place
    and without a branch, so that `add` can be part of a captured CUDA graph: the sum of the factors
    lives on the device.

    Args:
        parameters: the weights to come; means have their shapes and fp32 (or better).
        decay: in (0, 1].
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float = 1.0) -> None:
        self.decay = decay
        self.weights = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for p in parameters
        ]
        self.total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor]) -> None:
        """Take the present weights into the mean: one pass over memory."""
        self.total.mul_(self.decay).add_(1)
        rate = self.total.reciprocal()
        for mean, parameter in zip(self.weights, parameters, strict=True):
            mean.lerp_(parameter.to(mean.dtype), rate.to(mean.dtype))  # exact where rate is 1

    def clear(self) -> None:
        """Begin anew with the next addition."""
        self.total.zero_()
        for mean in self.weights:
            mean.zero_()  # a NaN would outlive a mere rate of 1

    @property
    def length(self) -> float:
        """Steps in the mean, for decay 1; 0 is an empty one. Waits for the device."""
        return self.total.item()


class Averaging:
    """The rule "none", evaluation sees the raw weights; and what the other rules share.

    Args:
        parameters: the weights being trained, all on one device.
    """

    saved: tuple[str, ...] = ()  # attributes that `state_dict` keeps: plain values

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.means: dict[str, Mean] = {}

    def update(self) -> None:
        """Take the weights into the averages; to be called after every optimizer step."""
        for mean in self.means.values():
            mean.add(self.parameters)

    def reset(self) -> None:
        """Begin the means anew, for the weights have been set back."""
        for mean in self.means.values():
            mean.clear()

    def begun(self) -> dict[str, Mean]:
        """The means that hold any weights; waits for the device."""
        return {name: mean for name, mean in self.means.items() if mean.length}

    def candidates(self) -> dict[str, list[Tensor]]:
        """The weights to score at a validation: "raw" first, then the averages that have begun.

        They are the tensors in use, not copies: good until the next `update`.
        """
        return {"raw": self.parameters} | {k: mean.weights for k, mean in self.begun().items()}

    def validated(self, ppl: Mapping[str, float], step: int) -> str:
        """Move the rule on after a validation.

        Args:
            ppl: validation perplexity of each candidate, by name.
            step: optimizer steps done.

        Returns:
            The name in `ppl` of the weights that evaluation uses from here.
        """
        return "average" if "average" in ppl else "raw"

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the rule will do depends on: tensors, and values fit for JSON."""
        tensors: dict[str, Tensor] = {}
        for name, mean in self.begun().items():
            tensors |= {f"{name}.{i}": weights for i, weights in enumerate(mean.weights)}
            tensors[f"{name}.total"] = mean.total
        return tensors, {name: copy.deepcopy(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state of another rule.
        """
        if set(values) != set(self.saved) or {k.split(".")[0] for k in tensors} - set(self.means):
            raise ValueError(
                f"the saved averages ({', '.join([*tensors, *values])}) are of another rule than "
                f"{type(self).__name__}: resume with the rule of the run"
            )
        for name in self.saved:
            setattr(self, name, copy.deepcopy(values[name]))
        for name, mean in self.means.items():
            mean.clear()
            if f"{name}.total" in tensors:
                mean.total.copy_(tensors[f"{name}.total"])
                for i, weights in enumerate(mean.weights):
                    weights.copy_(tensors[f"{name}.{i}"])


class Exponential(Averaging):
    """Exponential moving average from the first step on, its bias corrected.

    Args:
        decay: per step, in (0, 1); about 1 / (1 - decay) steps are remembered.
    """

    def __init__(self, parameters: Iterable[Tensor], *, decay: float = 0.999) -> None:
        super().__init__(parameters)
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}: give one between 0 and 1")
        self.means["average"] = Mean(self.parameters, decay)


class Triggered(Averaging):
    """A mean of all weights after one validation, which `triggered` picks; raw until then."""

    saved: tuple[str, ...] = ("started",)

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        self.means["average"] = Mean(self.parameters)
        self.started = False

    def triggered(self, ppl: float, step: int) -> bool:
        """Whether averaging starts now; asked at each validation until it does."""
        raise NotImplementedError

    def update(self) -> None:
        # On a GPU always, for a graph captured before the start has to hold it: the start clears.
        if self.started or self.parameters[0].is_cuda:
            super().update()

    def begun(self) -> dict[str, Mean]:
        return super().begun() if self.started else {}

    def validated(self, ppl: Mapping[str, float], step: int) -> str:
        if not self.started and self.triggered(_finite(ppl["raw"]), step):
            self.means["average"].clear()
            self.started = True
        return super().validated(ppl, step)


class NonMonotonic(Triggered):
    """NT-ASGD (Merity et al. 2017, arXiv 1708.02182) with the trigger of its published code.

    Averaging starts at a validation that is worse than the best of all earlier ones but the last n:
    `len(best_val_loss) > nonmono and val_loss > min(best_val_loss[:-nonmono])` in main.py of
    salesforce/awd-lstm-lm, the present loss not yet in the list; so not before validation n + 2.
    Algorithm 1 of the paper's arXiv version takes the minimum of the last n instead, a misprint
    according to its authors (issue 13 there), which starts at the first setback.

    The mean holds the weights after each step since; the paper also counts those at the trigger,
    torch.optim.ASGD(t0=0), which the code uses, leaves out those of the first step.

    Args:
        nonmono: n, in validations.
    """

    saved = ("started", "history")

    def __init__(self, parameters: Iterable[Tensor], *, nonmono: int = 5) -> None:
        super().__init__(parameters)
        if nonmono < 1:
            raise ValueError(f"nonmono is {nonmono}: give at least 1 validation")
        self.nonmono = nonmono
        self.history: list[float] = []

    def triggered(self, ppl: float, step: int) -> bool:
        n = self.nonmono
        now = len(self.history) > n and ppl > min(self.history[:-n])
        self.history.append(ppl)
        return now


class Tail(Triggered):
    """LAMB's tail average: starts when validation stalls, or late in the training.

    Its flags trigger_averaging_turns and trigger_averaging_at_the_latest; whichever comes first.

    Args:
        patience: validations without improvement after which averaging starts; None: never.
        start_step: steps of training at or after which it starts, at a validation (0: with the
            first step); None: never.

    Raises:
        ValueError: both are None.
    """

    saved = ("started", "best", "stale")

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        patience: int | None = 50,
        start_step: int | None = None,
    ) -> None:
        super().__init__(parameters)
        if patience is None and start_step is None:
            raise ValueError("averaging would never start: give patience or start_step")
        if patience is not None and patience < 1:
            raise ValueError(f"patience is {patience}: give at least 1 validation, or None")
        self.patience, self.start_step = patience, start_step
        self.started = start_step is not None and start_step <= 0
        self.best, self.stale = WORST, 0

    def triggered(self, ppl: float, step: int) -> bool:
        self.stale = 0 if ppl < self.best else self.stale + 1
        self.best = min(ppl, self.best)
        stalled = self.patience is not None and self.stale >= self.patience
        return stalled or (self.start_step is not None and step >= self.start_step)


class TwoTailed(Averaging):
    """Two-Tailed Averaging (Melis 2022, arXiv 2209.12581), Algorithm 2.

    A long and a short mean of the last L and S <= L weights. At a validation with perplexities F1
    (raw), FS and FL: if FS <= FL or FL stagnates, the short mean becomes the long one and a new
    short one begins; else if FS stagnates, it begins anew. Then the raw weights are used if L > 1
    and F1 <= FL (and where the long mean is but one validation old, L = E, both begin anew), else
    the long mean. For a constant learning rate; the long mean estimates the best tail at any time.

    A mean that takes over goes by the name under which it was scored ("short") until the next
    validation. While both are the same weights, only "long" is scored.

    Args:
        patience: a mean stagnates after so many validations without an improvement of its own; the
            paper says "a few", its figure 6b shows 3.
    """

    saved = ("history",)

    def __init__(self, parameters: Iterable[Tensor], *, patience: int = 3) -> None:
        super().__init__(parameters)
        if patience < 1:
            raise ValueError(f"patience is {patience}: give at least 1 validation")
        self.patience = patience
        self.means = {name: Mean(self.parameters) for name in ("long", "short")}
        self.history: dict[str, dict[str, Any]] = {}
        for name in self.means:
            self._clear(name)

    def _clear(self, name: str) -> None:
        self.means[name].clear()
        self.history[name] = {"best": WORST, "stale": 0, "validations": 0}

    def reset(self) -> None:
        for name in self.means:
            self._clear(name)

    def _stagnates(self, name: str) -> bool:
        return bool(self.history[name]["stale"] >= self.patience)

    def candidates(self) -> dict[str, list[Tensor]]:
        found = super().candidates()
        if "short" in found and self.means["short"].length == self.means["long"].length:
            del found["short"]
        return found

    def validated(self, ppl: Mapping[str, float], step: int) -> str:
        if "long" not in ppl:
            return "raw"
        for name in self.means.keys() & ppl.keys():
            own, loss = self.history[name], _finite(ppl[name])
            own["stale"] = 0 if loss < own["best"] else own["stale"] + 1
            own["best"] = min(loss, own["best"])
            own["validations"] += 1
        used = "long"
        if "short" not in ppl:
            self._clear("short")  # the long mean is already what it would become
        elif _finite(ppl["short"]) <= _finite(ppl["long"]) or self._stagnates("long"):
            # They change names, not places: a captured graph adds to both where they are.
            means, own = self.means, self.history
            means["long"], means["short"] = means["short"], means["long"]
            own["long"], own["short"] = own["short"], own["long"]
            self._clear("short")
            used = "short"
        elif self._stagnates("short"):
            self._clear("short")
        if self.means["long"].length > 1 and _finite(ppl["raw"]) <= _finite(ppl[used]):
            if self.history["long"]["validations"] == 1:
                self._clear("long")
                self._clear("short")
            return "raw"
        return used


RULES: dict[str, type[Averaging]] = {
    "none": Averaging,
    "nt_asgd": NonMonotonic,
    "tail": Tail,
    "ema": Exponential,
    "two_tailed": TwoTailed,
}


@contextmanager
def swapped(averaging: Averaging, weights: Sequence[Tensor]) -> Iterator[None]:
    """Within, the parameters have the values `weights`; after, on an error too, their own again.

    Values are copied in place, for captured graphs hold the addresses of the parameters, and caches
    of packed weights watch their versions. For the time it takes one more copy of the weights.
    """
    parameters = averaging.parameters
    if all(w is p for w, p in zip(weights, parameters, strict=True)):
        yield  # the raw weights
        return
    raw = [p.detach().clone() for p in parameters]
    try:
        _copy(weights, parameters)
        yield
    finally:
        _copy(raw, parameters)


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
