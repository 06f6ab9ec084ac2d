"""Time the recurrences, and a whole training step, against their peers and the machine's limit.

    python scripts/benchmark.py                                  # everything, all threads
    python scripts/benchmark.py --shape h650-r5 --threads 1
    python scripts/benchmark.py --shape lm-step --json out.json
    python scripts/benchmark.py --device cuda

Every candidate of a table runs in turn, many times, in this one process. A time is forward and
backward of one layer (lm-step: a whole training step). "naive" is the reference loop under autograd
in fp32. "limit" is the operations of the layer's products divided by the rate of a large product of
the same dtype, timed in the same turns; "x limit" is how many times longer than that it took. No
candidate is timed whose outputs or gradients disagree with the reference.
"""

import argparse
import contextlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from mogrifier_lm.kernels.cross_entropy import linear_cross_entropy
from mogrifier_lm.kernels.recurrence import BACKENDS

Step = Callable[[], None]


class Shape(NamedTuple):
    steps: int
    batch: int
    hidden: int
    rounds: int
    rank: int | None = None

    def spec(self) -> CellSpec:
        size = self.hidden
        return CellSpec(input_size=size, hidden_size=size, rounds=self.rounds, rank=self.rank)

    def operations(self) -> int:
        """Of the products of forward and backward: backward has two for each of forward."""
        matrices = sum(math.prod(s) for s in self.spec().shapes().values() if len(s) == 2)
        return 3 * 2 * self.steps * self.batch * matrices


SHAPES = {
    "h650-r5": Shape(35, 20, 650, 5),
    "h256-r5": Shape(35, 20, 256, 5),
    "h912-r5-rank84": Shape(70, 64, 912, 5, 84),
    "h650-r0": Shape(35, 20, 650, 0),
    "h200-r0": Shape(35, 20, 200, 0),
}
LM_STEP = "lm-step"  # two layers of 200, tied to 10,000 words, 5 rounds
PRECISIONS = ("fp32", "bf16")
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.05}  # root mean square, relative


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def layer_step(
    layer: nn.Module, shape: Shape, precision: str, device: str
) -> Callable[[], list[Tensor]]:
    """Forward and backward of `layer`; returns its output and every gradient."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.steps, shape.batch, shape.hidden)
    x, d_output = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    zeros = torch.zeros(size[1:], device=device)
    if isinstance(layer, nn.LSTM):
        zeros = zeros.unsqueeze(0)
    x.requires_grad_()

    def step() -> list[Tensor]:
        with autocast(device, precision):
            output, _ = layer(x, (zeros, zeros))
        inputs = [x, *layer.parameters()]
        return [output.detach(), *torch.autograd.grad(output, inputs, d_output.to(output.dtype))]

    return step


def agrees(backend: str, shape: Shape, precision: str, device: str) -> bool:
    """Whether output and gradients are the reference's on a small input."""
    small = shape._replace(steps=5, batch=3, hidden=35, rank=shape.rank and 11)
    reference = RecurrentLayer(small.spec(), "reference").to(device)
    layer = RecurrentLayer(small.spec(), backend).to(device)
    layer.load_state_dict(reference.state_dict())
    expected = layer_step(reference, small, "fp32", device)()
    values = layer_step(layer, small, precision, device)()
    return all(
        float((v - e).norm() / e.norm()) <= LARGEST_ERROR[precision]
        for v, e in zip(values, expected, strict=True)
    )


def large_product(precision: str, device: str) -> tuple[Step, int]:
    """A product that is as fast as products get, and its operations."""
    n = 1024 if device == "cpu" else 8192
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def lm_step(backend: str | None, precision: str, device: str) -> Step:
    """A step of a word-level language model; without a backend, of PyTorch's example of one."""
    steps, batch, size, words = 35, 20, 200, 10_000
    tokens, targets = torch.randint(words, (2, steps, batch), device=device)
    embedding = nn.Embedding(words, size, device=device)
    bias = nn.Parameter(torch.zeros(words, device=device))
    layers: list[nn.Module]
    if backend is None:
        layers = [nn.LSTM(size, size, num_layers=2, device=device)]
        zeros = torch.zeros(2, batch, size, device=device)
    else:
        spec = CellSpec(input_size=size, hidden_size=size, rounds=5)
        layers = [RecurrentLayer(spec, backend, device) for _ in range(2)]
        zeros = torch.zeros(batch, size, device=device)
    model = nn.ModuleList([embedding, nn.ParameterList([bias]), *layers])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            hidden = embedding(tokens)
            for layer in layers:
                hidden, _ = layer(hidden, (zeros, zeros))
            rows, words_N = hidden.flatten(0, 1), targets.flatten()
            if backend is None:
                logits = nn.functional.linear(rows, embedding.weight, bias)
                loss = cross_entropy(logits, words_N)
            else:
                loss = linear_cross_entropy(rows, embedding.weight, bias, words_N) / len(words_N)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def interleave(candidates: dict[Any, Step], seconds: float, device: str) -> dict[Any, list[float]]:
    """Milliseconds of each candidate, all of them in turn for about `seconds`, at least 5 times."""
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for step in candidates.values():
        step()
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 5 or time.perf_counter() < end:
        for name, step in candidates.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
        turns += 1
    return times


def measure(name: str, seconds: float, device: str) -> list[dict[str, Any]]:
    """The rows of one table."""
    shape = SHAPES.get(name, Shape(35, 20, 200, 5))
    candidates: dict[tuple[str, str], Step] = {}
    wrong = []
    for precision in PRECISIONS:
        for backend in BACKENDS:
            if not agrees(backend, shape, precision, device):
                wrong.append((backend, precision))
            elif name == LM_STEP:
                candidates[backend, precision] = lm_step(backend, precision, device)
            elif precision == "fp32" or backend != "reference":
                layer = RecurrentLayer(shape.spec(), backend, device)
                candidates[backend, precision] = layer_step(layer, shape, precision, device)
        if name == LM_STEP:
            candidates["nn.LSTM example", precision] = lm_step(None, precision, device)
        elif shape.rounds == 0:
            layer = nn.LSTM(shape.hidden, shape.hidden, device=device)
            candidates["nn.LSTM", precision] = layer_step(layer, shape, precision, device)
    products = {("product", p): large_product(p, device) for p in PRECISIONS}
    times = interleave(candidates | {n: step for n, (step, _) in products.items()}, seconds, device)
    base = median(times["nn.LSTM example" if name == LM_STEP else "reference", "fp32"])
    rows: list[dict[str, Any]] = [
        {"shape": name, "candidate": c, "precision": p, "disagrees": True} for c, p in wrong
    ]
    for candidate, precision in candidates:
        ms = times[candidate, precision]
        row = {"shape": name, "candidate": candidate, "precision": precision, "ms": median(ms)}
        row |= {"min_ms": min(ms), "repeats": len(ms), "speedup": base / row["ms"]}
        row["tokens_per_second"] = shape.steps * shape.batch / row["ms"] * 1000
        if name != LM_STEP:
            product_ms = median(times["product", precision])
            rate = products["product", precision][1] / product_ms
            row |= {"x_limit": row["ms"] * rate / shape.operations(), "gflops": rate / 1e6}
        rows.append(row)
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> str:
    what = "example" if name == LM_STEP else "naive"
    lines = [
        f"{'candidate':<16} {'':<5} {'ms':>8} {'min':>8} {'x ' + what:>10} {'x limit':>8} tokens/s"
    ]
    for row in rows:
        start = f"{row['candidate']:<16} {row['precision']:<5}"
        if "disagrees" in row:
            lines.append(f"{start} not timed: its output or gradients disagree with the reference")
            continue
        limit = f"{row['x_limit']:8.2f}" if "x_limit" in row else " " * 8
        lines.append(
            f"{start} {row['ms']:8.1f} {row['min_ms']:8.1f} {row['speedup']:10.2f} {limit} "
            f"{row['tokens_per_second']:8.0f}"
        )
    return "\n".join(lines)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        [line for line in info.open() if line.startswith("model name")] if info.exists() else []
    )
    model = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [*SHAPES, LM_STEP]
    parser.add_argument("--shape", nargs="+", default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--threads", type=int, help="CPU threads, default torch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=20, help="per table, default 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if unknown := [name for name in args.shape if name not in known]:
        print(
            f"shape {unknown[0]!r} is not known, it must be one of {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    header = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device_name(args.device),
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    for name in args.shape:
        rows += (measured := measure(name, args.seconds, args.device))
        print(f"\n{name}: {SHAPES.get(name, 'two layers of 200, 5 rounds, 10,000 words, 20 x 35')}")
        print(table(name, measured), flush=True)
    if args.json:
        args.json.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    return 1 if any("disagrees" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
