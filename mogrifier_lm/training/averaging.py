"""Averages of the weights over training: evaluation sees the average, training goes on raw.

Every rule (`RULES`) has one interface. `update` follows each optimizer step; at a validation all
`candidates` are scored and `after_validation` names the one that evaluation uses from there:

    candidates = averaging.candidates()
    for name, weights in candidates.items():
        with swapped(averaging, weights):
            ppl[name] = ...
    used = averaging.after_validation(ppl, step)  # candidates[used], with the perplexity ppl[used]
"""

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.model import copy_values, restored


class Mean:
    """A running mean of weights, one copy of them: Σ decay^(t-i) w_i / Σ decay^(t-i) after step t.

    With decay 1 the arithmetic mean, below it the exponential one with its bias corrected. `add`
    can be part of a captured CUDA graph: no branches, the sum of the factors lives on the device.
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
        """Take the present weights in, with one pass over memory."""
        self.total.mul_(self.decay).add_(1)
        rate = self.total.reciprocal()
        for mean, parameter in zip(self.weights, parameters, strict=True):
            mean.lerp_(parameter.to(mean.dtype), rate.to(mean.dtype))

    def clear(self) -> None:
        """Begin anew with the next addition."""
        self.total.zero_()
        for mean in self.weights:
            mean.zero_()  # a NaN would outlive a mere rate of 1

    @property
    def length(self) -> float:
        """Number of steps in the mean, for decay 1; 0 if empty. Waits for the device."""
        return self.total.item()


class Averaging:
    """The rule "none", evaluation sees the raw weights; and what all rules share.

    Args:
        parameters: the weights in training, all on one device.
    """

    saved: tuple[str, ...] = ()  # attributes with plain values that `state_dict` keeps

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
        """The means that are not empty; waits for the device."""
        return {name: mean for name, mean in self.means.items() if mean.length}

    def candidates(self) -> dict[str, list[Tensor]]:
        """Name → weights to score at a validation: "raw", then each average that has begun.

        They are the tensors in use, not copies: good until the next `update`.
        """
        return {"raw": self.parameters} | {k: mean.weights for k, mean in self.begun().items()}

    def after_validation(self, ppl: Mapping[str, float], step: int) -> str:
        """Move the rule on after a validation.

        Args:
            ppl: validation perplexity of each candidate.
            step: number of optimizer steps done.

        Returns:
            Which of them evaluation uses from here.
        """
        return "average" if "average" in ppl else "raw"

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the rule's future depends on: tensors, and values fit for JSON."""
        tensors: dict[str, Tensor] = {}
        for name, mean in self.begun().items():
            tensors |= {f"{name}.{i}": weights for i, weights in enumerate(mean.weights)}
            tensors[f"{name}.total"] = mean.total
        return tensors, {name: copy.deepcopy(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state is another rule's.
        """
        if set(values) != set(self.saved) or {k.split(".")[0] for k in tensors} - set(self.means):
            raise ValueError(
                f"not a state of {type(self).__name__}: resume with the run's own rule"
            )
        for name in self.saved:
            if type(values[name]) is not type(getattr(self, name)):
                raise ValueError(f"{name} is {values[name]!r}")
            setattr(self, name, copy.deepcopy(values[name]))
        for name, mean in self.means.items():
            mean.clear()
            if f"{name}.total" in tensors:
                mean.total.copy_(tensors[f"{name}.total"])
                saved = [tensors[f"{name}.{i}"] for i in range(len(mean.weights))]
                if any(a.shape != b.shape for a, b in zip(saved, mean.weights, strict=True)):
                    raise ValueError(f"the {name} is of other weights")
                copy_values(saved, mean.weights)


class Exponential(Averaging):
    """Exponential moving average from the first step on, over about 1 / (1 - decay) steps."""

    def __init__(self, parameters: Iterable[Tensor], *, decay: float) -> None:
        super().__init__(parameters)
        self.means["average"] = Mean(self.parameters, decay)


class Triggered(Averaging):
    """Raw until a validation at which `triggers`; then the mean of all weights after it."""

    saved = ("started", "history")

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        self.means["average"] = Mean(self.parameters)
        self.started = False
        self.history: list[float] = []  # raw perplexities until the start, the present one last

    def triggers(self, step: int) -> bool:
        """Whether averaging starts at this validation."""
        raise NotImplementedError

    def update(self) -> None:
        # On a GPU always: a graph captured before the start must hold it. The start clears.
        if self.started or self.parameters[0].is_cuda:
            super().update()

    def begun(self) -> dict[str, Mean]:
        return super().begun() if self.started else {}

    def after_validation(self, ppl: Mapping[str, float], step: int) -> str:
        if not self.started:
            self.history.append(_finite(ppl["raw"]))
            if self.triggers(step):
                self.started = True
                self.means["average"].clear()
        return super().after_validation(ppl, step)


class NonMonotonic(Triggered):
    """NT-ASGD (Merity et al. 2017, arXiv 1708.02182) with the trigger of its published code.

    Averaging starts at a validation that is worse than the best of all before it but the last n:
    `len(best_val_loss) > nonmono and val_loss > min(best_val_loss[:-nonmono])` in main.py of
    salesforce/awd-lstm-lm, val_loss not yet in the list; so at validation n + 2 or later. The
    arXiv paper's Algorithm 1 takes the minimum of the last n instead, a misprint according to its
    authors (issue 13 there), which starts at the first setback. The mean holds the weights after
    every step since; torch.optim.ASGD(t0=0), which that code uses, leaves the first step's out.

    Args:
        nonmono: n, in validations, at least 1.
    """

    def __init__(self, parameters: Iterable[Tensor], *, nonmono: int) -> None:
        super().__init__(parameters)
        self.nonmono = nonmono

    def triggers(self, step: int) -> bool:
        *earlier, now = self.history
        return len(earlier) > self.nonmono and now > min(earlier[: -self.nonmono])


class Tail(Triggered):
    """LAMB's tail average: from where validation stalls, or late in training if that is earlier.

    Args:
        patience: starts after so many validations without improvement (its flag
            trigger_averaging_turns).
        start_step: starts at the first validation at or after this step (its flag
            trigger_averaging_at_the_latest; 0: from the first step on); None: never so.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, patience: int, start_step: int | None = None
    ) -> None:
        super().__init__(parameters)
        self.patience = patience
        self.start_step = math.inf if start_step is None else start_step
        self.started = start_step == 0

    def triggers(self, step: int) -> bool:
        return _since_best(self.history) >= self.patience or step >= self.start_step


class TwoTailed(Averaging):
    """Two-Tailed Averaging (Melis 2022, arXiv 2209.12581), Algorithm 2.

    Means of the last L and the last S ≤ L weights, with perplexities FL and FS at a validation, raw
    F1. If FS ≤ FL or FL stagnates, the short mean becomes the long one and a new short one begins;
    else if FS stagnates, the short one begins anew. Then evaluation uses the raw weights if L > 1
    and F1 ≤ FL (and if L spans one validation interval only, both means begin anew), else the long
    mean. Made for a constant learning rate. A mean that becomes the long one is still called
    "short" by the validation that makes it so: its score has that name.

    Args:
        patience: a mean stagnates after so many validations without improving on itself (in the
            paper "a few", 3 in its figure of a reset).
    """

    saved = ("history",)

    def __init__(self, parameters: Iterable[Tensor], *, patience: int) -> None:
        super().__init__(parameters)
        self.patience = patience
        self.means = {name: Mean(self.parameters) for name in ("long", "short")}
        self.history: dict[str, list[float]] = {"long": [], "short": []}  # since each mean began

    def after_validation(self, ppl: Mapping[str, float], step: int) -> str:
        if "short" not in ppl:  # no step since the last validation
            return "long" if "long" in ppl else "raw"
        loss = {name: _finite(value) for name, value in ppl.items()}
        for name, losses in self.history.items():
            losses.append(loss[name])
        stagnant = {k for k, v in self.history.items() if _since_best(v) >= self.patience}
        used = "long"
        if loss["short"] <= loss["long"] or "long" in stagnant:
            used = "short"
            # Names change, places do not: a captured graph adds to both where they are.
            self.means = {"long": self.means["short"], "short": self.means["long"]}
            self.history = {"long": self.history["short"], "short": []}
            self._clear("short")
        elif "short" in stagnant:
            self._clear("short")
        if self.means["long"].length > 1 and loss["raw"] <= loss[used]:
            if len(self.history["long"]) == 1:
                self._clear("long", "short")
            return "raw"
        return used

    def reset(self) -> None:
        self._clear("long", "short")

    def _clear(self, *names: str) -> None:
        for name in names:
            self.means[name].clear()
            self.history[name] = []


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

    Copies in place: captured graphs hold the parameters' addresses, caches of packed weights watch
    their versions. Takes one more copy of the weights meanwhile; nothing for the raw ones.
    """
    parameters = averaging.parameters
    if all(weight is parameter for weight, parameter in zip(weights, parameters, strict=True)):
        yield
        return
    with restored(parameters):
        copy_values(weights, parameters)
        yield


def _finite(ppl: float) -> float:
    """The perplexity; for infinity and NaN the largest float, which compares and fits JSON."""
    return ppl if ppl < sys.float_info.max else sys.float_info.max


def _since_best(history: Sequence[float]) -> int:
    """How many validations ago the best was, the earliest of equals."""
    return len(history) - 1 - history.index(min(history))
