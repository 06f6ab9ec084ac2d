"""Timings against the naive loop, torch.nn.LSTM and the machine's limit, interleaved in one process.

    python scripts/benchmark.py --threads 1 2 --json benchmark.json
    python scripts/benchmark.py --parts lm-step --device cuda

A recurrence's shape (T35-B20-H650-r5, also -k84 for a rank): forward and backward of one layer. The
naive candidate is `reference` in fp32; the limit is the operations of all products divided by the
rate of a large product of the same dtype. lm-step: a training step (loss, backward, clip, SGD) of
two layers of 200 at rounds 5 on 10,000 words and 35 x 20 tokens; its naive candidate is the plain
LSTM of PyTorch's word-language-model example. A candidate is timed only after its output and
gradients have been checked against the reference.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.model import LanguageModel, layer_specs

LM_STEP = "lm-step"
PARTS = [
    *("T35-B20-H650-r5", "T35-B20-H256-r5", "T70-B64-H912-r5-k84"),
    *("T35-B20-H650-r0", "T35-B20-H200-r0", LM_STEP),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = {"fp32": 1e-6, "bf16": 2e-3}  # on top of twice the reference's own error
Step = Callable[[], object]


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def refuse_unless_right(spec: CellSpec, backend: str, precision: str, device: str) -> None:
    """Exit unless a small copy of the layer errs at most twice as much as the reference."""
    spec = replace(spec, input_size=24, hidden_size=24, rank=spec.rank and min(spec.rank, 8))
    values = RecurrentLayer(spec, "reference", device).state_dict()
    x, d_output = torch.randn(2, 7, 3, 24, device=device)
    state = torch.randn(2, 3, 24, device=device).tanh()

    def results(backend: str, precision: str, dtype: torch.dtype) -> list[Tensor]:
        layer = RecurrentLayer(spec, backend, device).to(dtype)
        layer.load_state_dict(values)
        x_, h, c = (tensor.to(dtype).requires_grad_() for tensor in (x, *state))
        with autocast(device, precision):
            output, _ = layer(x_, (h, c))
        wanted = [x_, h, c, *layer.parameters()]
        return [output, *torch.autograd.grad(output, wanted, d_output.to(output.dtype))]

    exact = results("reference", "fp32", torch.float64)
    reference, fast = (results(name, precision, torch.float32) for name in ("reference", backend))
    names = ["output", *(f"gradient of {name}" for name in ("x", "h", "c", *values))]
    for name, e, r, f in zip(names, exact, reference, fast, strict=True):
        error, allowed = (float((value - e).norm() / e.norm()) for value in (f, r))
        if not error <= 2 * allowed + TINY[precision]:
            sys.exit(f"refused: {backend} {precision} is off by {error:.0e} in {name} of {spec}")


def layer_step(layer: nn.Module, size: tuple[int, ...], device: str, precision: str) -> Step:
    x = torch.randn(size, device=device, requires_grad=True)
    d_output = torch.randn(size, device=device)
    state = torch.zeros(size[1:], device=device)
    if isinstance(layer, nn.LSTM):
        state = state.unsqueeze(0)

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        with autocast(device, precision):
            output, _ = layer(x, (state, state))
        output.backward(d_output.to(output.dtype))

    return step


class ExampleLM(nn.Module):
    """PyTorch's word-language-model example with tied matrices: full logits, no dropout."""

    def __init__(self, words: int, size: int, layers: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, size, device=device).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(words, device=device))
        self.lstm = nn.LSTM(size, size, layers, device=device)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        output, _ = self.lstm(embedding(inputs, self.weight))
        logits = linear(output.flatten(0, 1), self.weight, self.bias)
        return cross_entropy(logits, targets.flatten())


def lm_step(name: str, device: str, precision: str) -> Step:
    words, size, layers = 10_000, 200, 2
    inputs, targets = torch.randint(words, (2, 35, 20), device=device)
    if name == "nn.LSTM":
        model = ExampleLM(words, size, layers, device)
    else:
        specs = layer_specs(size, size, layers, rounds=5)
        model = LanguageModel(words, size, specs, backend=name, device=device)
    state = () if name == "nn.LSTM" else (model.zero_states(20),)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = model.loss(inputs, targets, *state)
        (loss if name == "nn.LSTM" else loss[0] / targets.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def candidates_of(part: str, device: str) -> tuple[dict[str, Step], int, float]:
    """Candidates by name, the naive one first; tokens of a step; operations of its products."""
    spec, size = CellSpec(input_size=200, hidden_size=200, rounds=5), (35, 20, 200)
    if part != LM_STEP:
        steps, batch, hidden, rounds, rank = (
            int(number) if number else None
            for number in re.fullmatch(r"T(\d+)-B(\d+)-H(\d+)-r(\d+)(?:-k(\d+))?", part).groups()
        )
        spec = CellSpec(input_size=hidden, hidden_size=hidden, rounds=rounds, rank=rank)
        size = (steps, batch, hidden)
    candidates = {}
    for name in ["nn.LSTM", *BACKENDS] if part == LM_STEP else [*BACKENDS, "nn.LSTM"]:
        if name == "nn.LSTM" and part != LM_STEP and spec.rounds > 0:
            continue
        for precision in DTYPES:
            if name != "nn.LSTM":
                try:
                    resolve(name, device)
                except ValueError as error:
                    print(f"left out: {error}")
                    break
                refuse_unless_right(spec, name, precision, device)
            if part == LM_STEP:
                step = lm_step(name, device, precision)
            elif name == "nn.LSTM":
                step = layer_step(nn.LSTM(*size[1:], device=device), size, device, precision)
            else:
                step = layer_step(RecurrentLayer(spec, name, device), size, device, precision)
            candidates[f"{name} {precision}"] = step
    matrices = [shape for shape in spec.shapes().values() if len(shape) == 2]
    tokens = size[0] * size[1]
    return candidates, tokens, 6 * tokens * sum(rows * columns for rows, columns in matrices)
