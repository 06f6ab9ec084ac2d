"""Timings against the naive loop, torch.nn.LSTM and the machine's limit, interleaved in one process.

    python scripts/benchmark.py --threads 1 2 --json benchmark.json
    python scripts/benchmark.py --parts T70-B64-H912-r5-k84 lm-step --device cuda

A recurrence's shape, -k for a rank: forward and backward of one layer; naive is `reference` in fp32.
lm-step: a training step (loss, backward, clip, SGD) of two layers of 200 at rounds 5 on 10,000 words
and 35 x 20 tokens; naive is the plain LSTM of PyTorch's word-language-model example in fp32. The
limit is the operations of all products divided by the rate of a large product of the same dtype.
Nothing is printed unless outputs and gradients of every backend agree with the reference's.
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
from mogrifier_lm.model import LanguageModel

LM_STEP, WORDS = "lm-step", 10_000
SHAPES = ["T35-B20-H650-r5", "T35-B20-H256-r5", "T70-B64-H912-r5-k84"]
PARTS = [*SHAPES, "T35-B20-H650-r0", "T35-B20-H200-r0", LM_STEP]
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
    h, c = torch.randn(2, 3, 24, device=device).tanh()

    def results(backend: str, precision: str, dtype: torch.dtype) -> list[Tensor]:
        layer = RecurrentLayer(spec, backend, device).to(dtype)
        layer.load_state_dict(values)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, h, c)]
        with autocast(device, precision):
            output, _ = layer(inputs[0], (inputs[1], inputs[2]))
        wanted = [*inputs, *layer.parameters()]
        return [output, *torch.autograd.grad(output, wanted, d_output.to(output.dtype))]

    exact = results("reference", "fp32", torch.float64)
    reference, fast = (results(name, precision, torch.float32) for name in ("reference", backend))
    names = ["output", *(f"gradient of {name}" for name in ("x", "h", "c", *values))]
    for name, e, r, f in zip(names, exact, reference, fast, strict=True):
        error, allowed = (float((value - e).norm() / e.norm()) for value in (f, r))
        if not error <= 2 * allowed + TINY[precision]:
            sys.exit(f"refused: {backend} {precision} is off by {error:.0e} in {name} of {spec}")


def layer_step(
    name: str, spec: CellSpec, tokens: tuple[int, int], device: str, precision: str
) -> Step:
    """Forward and backward of one layer."""
    (steps, batch), size = tokens, spec.hidden_size
    x = torch.randn(steps, batch, size, device=device, requires_grad=True)
    d_output = torch.randn(steps, batch, size, device=device)
    if name == "nn.LSTM":
        layer, zeros = nn.LSTM(size, size), torch.zeros(1, batch, size, device=device)
    else:
        layer, zeros = RecurrentLayer(spec, name, device), torch.zeros(batch, size, device=device)
    layer.to(device)

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        with autocast(device, precision):
            output, _ = layer(x, (zeros, zeros))
        output.backward(d_output.to(output.dtype))

    return step


class ExampleLM(nn.Module):
    """PyTorch's word-language-model example, tied: full logits, no dropout."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WORDS, size).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(WORDS))
        self.lstm = nn.LSTM(size, size, 2)

    def loss(self, inputs: Tensor, targets: Tensor, states: None) -> tuple[Tensor, object]:
        output, states = self.lstm(embedding(inputs, self.weight), states)
        logits = linear(output.flatten(0, 1), self.weight, self.bias)
        return cross_entropy(logits, targets.flatten(), reduction="sum"), states


def lm_step(
    name: str, spec: CellSpec, tokens: tuple[int, int], device: str, precision: str
) -> Step:
    """A training step of two layers."""
    inputs, targets = torch.randint(WORDS, (2, *tokens), device=device)
    if name == "nn.LSTM":
        model, states = ExampleLM(spec.hidden_size).to(device), None
    else:
        model = LanguageModel(WORDS, spec.hidden_size, [spec, spec], backend=name, device=device)
        states = model.zero_states(tokens[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            nats, _ = model.loss(inputs, targets, states)
        (nats / targets.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def large_product(dtype: torch.dtype, device: str) -> tuple[Step, int]:
    """A square product, and its operations."""
    n = 2048 if device == "cpu" else 8192
    a, b, out = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def milliseconds(step: Step, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def measure(part: str, device: str, repeats: int) -> list[dict[str, object]]:
    """A row per candidate; each repeat times every candidate once, after two that warm up."""
    shape = "T35-B20-H200-r5" if part == LM_STEP else part
    match = re.fullmatch(r"T(\d+)-B(\d+)-H(\d+)-r(\d+)(?:-k(\d+))?", shape)
    if match is None:
        sys.exit(f"{part} is not a part: give {LM_STEP} or a shape like {', '.join(SHAPES)}")
    steps, batch, size, rounds, rank = (n and int(n) for n in match.groups())
    spec = CellSpec(input_size=size, hidden_size=size, rounds=rounds, rank=rank)
    matrices = [shape for shape in spec.shapes().values() if len(shape) == 2]
    operations = 6 * steps * batch * sum(rows * columns for rows, columns in matrices)
    if part == LM_STEP:
        operations = 2 * operations + 6 * steps * batch * WORDS * size

    peer = ["nn.LSTM"] if part == LM_STEP or rounds == 0 else []
    timed = {}
    for name in [*peer, *BACKENDS] if part == LM_STEP else [*BACKENDS, *peer]:
        for precision in DTYPES:
            if name in BACKENDS:
                try:
                    resolve(name, device)
                except ValueError as error:
                    print(f"left out: {error}")
                    break
                refuse_unless_right(spec, name, precision, device)
            build = lm_step if part == LM_STEP else layer_step
            timed[name, precision] = build(name, spec, (steps, batch), device, precision)
    for precision, dtype in DTYPES.items():
        timed["limit", precision], product = large_product(dtype, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for repeat in range(repeats + 2):
        for key, step in timed.items():
            elapsed = milliseconds(step, device)
            if repeat >= 2:
                times[key].append(elapsed * (operations / product if key[0] == "limit" else 1))

    median = {key: statistics.median(values) for key, values in times.items()}
    naive = next(iter(median.values()))
    return [
        {
            "candidate": f"{name} {precision}",
            "ms": median[name, precision],
            "min_ms": min(times[name, precision]),
            "times_naive": naive / median[name, precision],
            "times_limit": median[name, precision] / median["limit", precision],
            "tokens_per_second": 1000 * steps * batch / median[name, precision],
        }
        for name, precision in timed
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write header and tables here")
    args = parser.parse_args()
    header = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    header["cpu"] = found[1] if found else platform.processor()
    if args.device == "cuda":
        header["gpu"] = torch.cuda.get_device_name()
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    torch.manual_seed(0)
    tables = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for part in args.parts:
            rows = measure(part, args.device, args.repeats)
            tables.append({"part": part, "threads": threads, "rows": rows})
            print(f"\n{part}, {threads} threads, median of {args.repeats}")
            print(f"{'':16}{'ms':>9}{'min':>9}{'x naive':>9}{'x limit':>9}{'tokens/s':>10}")
            for row in rows:
                name, ms, least, naive, limit, rate = row.values()
                print(f"{name:16}{ms:9.2f}{least:9.2f}{naive:9.2f}{limit:9.2f}{rate:10.0f}")
    if args.json:
        args.json.write_text(json.dumps({**header, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()
