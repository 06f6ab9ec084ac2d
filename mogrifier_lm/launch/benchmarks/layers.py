"""One layer forward and backward, on every backend and as others write it."""

import math
import signal
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.launch.benchmarks.timing import (
    DISAGREES,
    Rows,
    Step,
    agree,
    autocast,
    captured,
    measure,
)
from mogrifier_lm.model import layer_specs

COMPILED, LSTM = "compiled", "nn.LSTM"


class Shape(NamedTuple):
    steps: int
    batch: int
    hidden: int
    rounds: int
    rank: int | None = None

    @property
    def small(self) -> "Shape":
        return self._replace(steps=5, batch=3, hidden=35, rank=self.rank and 11)

    def specs(self, layers: int) -> list[CellSpec]:
        return layer_specs([self.hidden] * (layers + 1), rounds=self.rounds, rank=self.rank)

    def operations(self) -> int:
        """Of the products of a layer's forward and backward: backward has two for each forward."""
        matrices = sum(math.prod(s) for s in self.specs(1)[0].shapes().values() if len(s) == 2)
        return 3 * 2 * self.steps * self.batch * matrices


RECURRENCES = {
    "h650-r5": Shape(35, 20, 650, 5),
    "h256-r5": Shape(35, 20, 256, 5),
    "h912-r5-rank84": Shape(70, 64, 912, 5, 84),
    "h650-r0": Shape(35, 20, 650, 0),
    "h200-r0": Shape(35, 20, 200, 0),
}


def layer_step(layer: nn.Module, shape: Shape, precision: str, device: str) -> Step:
    """Forward and backward of `layer`; returns its output and every gradient."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.steps, shape.batch, shape.hidden)
    x, d_output = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    state = torch.zeros((1, *size[1:]) if isinstance(layer, nn.LSTM) else size[1:])
    inputs = [x.requires_grad_(), *layer.parameters()]
    state = state.to(device)

    def step() -> list[Tensor]:
        with autocast(precision, device):
            output, _ = layer(x, (state, state))
        return [output.detach(), *torch.autograd.grad(output, inputs, d_output.to(output.dtype))]

    return step


def finishes(step: Step, limit: int) -> bool:
    """Whether the first call of a compiled step returns within `limit` seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    old, start = signal.signal(signal.SIGALRM, stop), time.perf_counter()
    signal.alarm(limit)
    try:
        step()
    except Exception:  # torch.compile wraps what it meets in its own
        if time.perf_counter() - start < limit:
            raise
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return True


def recurrence(shape: Shape, device: str, seconds: float, compile_seconds: int) -> Rows:
    """Rows of one recurrent layer: every backend beside torch's own and compiled loops."""

    def build(name: str, precision: str) -> Step | str:
        def step_of(layer: Any, shape: Shape = shape, precision: str = precision) -> Step:
            return layer_step(layer, shape, precision, device)

        if name == LSTM:
            return captured(step_of(nn.LSTM(shape.hidden, shape.hidden, device=device)), device)
        if name == COMPILED:
            if precision != "fp32" or not compile_seconds:
                return ""
            layer = RecurrentLayer(shape.specs(1)[0], "reference", device)
            step = step_of(torch.compile(layer))
            late = f"torch.compile had not finished after {compile_seconds} s"
            return step if finishes(step, compile_seconds) else late
        resolve(name, device)
        few = shape.small
        reference, layer = (RecurrentLayer(few.specs(1)[0], b, device) for b in ("reference", name))
        layer.load_state_dict(reference.state_dict())
        if not agree(step_of(layer, few)(), step_of(reference, few, "fp32")(), precision):
            return DISAGREES
        return captured(step_of(RecurrentLayer(shape.specs(1)[0], name, device)), device)

    candidates = [*BACKENDS, *([] if shape.rounds else [LSTM]), COMPILED]
    tokens = shape.steps * shape.batch
    return measure(build, candidates, tokens, shape.operations(), seconds, device)
