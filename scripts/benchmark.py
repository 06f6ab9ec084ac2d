"""Time the recurrences, and a whole training step, against their peers and the machine's limit.

    python scripts/benchmark.py                                  # everything, all threads
    python scripts/benchmark.py --shape h650-r5 --threads 1
    python scripts/benchmark.py --shape lm-step --json out.json
    python scripts/benchmark.py --device cuda

The candidates of a table take turns, many times, in this one process. A time is the median of
forward and backward of one layer (lm-step: of a whole training step). "x naive" is how many times
faster than the reference loop under autograd in fp32 it is (lm-step: than PyTorch's example), "x
limit" how many times longer it takes than its operations at the rate of a large product of the same
dtype, timed in the same turns. A candidate whose outputs or gradients disagree with the reference
is not timed, and the exit code is 1.
"""

import argparse
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
from torch.nn.functional import cross_entropy, linear

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from mogrifier_lm.kernels.cross_entropy import linear_cross_entropy
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve


class Shape(NamedTuple):
    steps: int
    batch: int
    hidden: int
    rounds: int
    rank: int | None = None

    def spec(self) -> CellSpec:
        h = self.hidden
        return CellSpec(input_size=h, hidden_size=h, rounds=self.rounds, rank=self.rank)

    def operations(self) -> int:
        """Of the products of forward and backward: backward has two for each of forward."""
        matrices = sum(math.prod(s) for s in self.spec().shapes().values() if len(s) == 2)
        return 3 * 2 * self.steps * self.batch * matrices


LM_STEP, WORDS = "lm-step", 10_000  # two layers, tied
SHAPES = {
    "h650-r5": Shape(35, 20, 650, 5),
    "h256-r5": Shape(35, 20, 256, 5),
    "h912-r5-rank84": Shape(70, 64, 912, 5, 84),
    "h650-r0": Shape(35, 20, 650, 0),
    "h200-r0": Shape(35, 20, 200, 0),
    LM_STEP: Shape(35, 20, 200, 5),
}
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.05}  # root mean square, relative
DISAGREES = "its output or gradients disagree with the reference"
PEER = "nn.LSTM"


def unavailable(backend: str, device: str) -> str | None:
    """Why `backend` does not run here, in one line; None where it does."""
    try:
        resolve(backend, device)
    except ValueError as reason:
        return str(reason)
    return None


def layer_step(
    layer: nn.Module, shape: Shape, precision: str, device: str
) -> Callable[[], list[Tensor]]:
    """Forward and backward of `layer`; returns its output and every gradient."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.steps, shape.batch, shape.hidden)
    x, d_output = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    zeros = torch.zeros(size[1:] if isinstance(layer, RecurrentLayer) else (1, *size[1:])).to(
        device
    )
    inputs = [x.requires_grad_(), *layer.parameters()]

    def step() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output, _ = layer(x, (zeros, zeros))
        return [output.detach(), *torch.autograd.grad(output, inputs, d_output.to(output.dtype))]

    return step


def agrees(backend: str, shape: Shape, precision: str, device: str) -> bool:
    """Whether output and gradients are the reference's on a small input."""
    small = shape._replace(steps=5, batch=3, hidden=35, rank=shape.rank and 11)
    reference, layer = (
        RecurrentLayer(small.spec(), name, device).to(device) for name in ("reference", backend)
    )
    layer.load_state_dict(reference.state_dict())
    expected = layer_step(reference, small, "fp32", device)()
    values = layer_step(layer, small, precision, device)()
    errors = [float((v - e).norm() / e.norm()) for v, e in zip(values, expected, strict=True)]
    return max(errors) <= LARGEST_ERROR[precision]


def lm_step(name: str, shape: Shape, precision: str, device: str) -> Callable[[], None]:
    """A step of a word-level language model; of PyTorch's own example for nn.LSTM."""
    size, batch = shape.hidden, (shape.steps, shape.batch)
    tokens, targets = torch.randint(WORDS, (2, *batch), device=device)
    embedding = nn.Embedding(WORDS, size, device=device)
    nn.init.uniform_(embedding.weight, -0.1, 0.1)  # the example's; larger ones mean subnormals
    bias = nn.Parameter(torch.zeros(WORDS, device=device))
    layers: list[nn.Module] = (
        [nn.LSTM(size, size, num_layers=2, device=device)]
        if name == PEER
        else [RecurrentLayer(shape.spec(), name, device) for _ in range(2)]
    )
    zeros = torch.zeros(*([2] if name == PEER else []), shape.batch, size, device=device)
    parameters = [bias, *nn.ModuleList([embedding, *layers]).parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            hidden = embedding(tokens)
            for layer in layers:
                hidden, _ = layer(hidden, (zeros, zeros))
            rows, words = hidden.flatten(0, 1), targets.flatten()
            if name == PEER:
                loss = cross_entropy(linear(rows, embedding.weight, bias), words)
            else:
                loss = linear_cross_entropy(rows, embedding.weight, bias, words) / len(words)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.25)
        optimizer.step()

    return step


def large_product(precision: str, device: str) -> tuple[Callable[[], Any], int]:
    """A product that runs as fast as products do, and its operations."""
    n = 1024 if device == "cpu" else 8192
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b, out = torch.randn(3, n, n, device=device).to(dtype)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def take_turns(
    steps: dict[tuple[str, str], Callable[[], Any]], seconds: float, device: str
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each step, over about `seconds` and at least 5 turns after a first one."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 6 or time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: ms[1:] for name, ms in times.items()}


def measure(name: str, seconds: float, device: str) -> list[dict[str, Any]]:
    """The rows of one table."""
    shape = SHAPES[name]
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    for precision in LARGEST_ERROR:
        peer = [PEER] if name == LM_STEP or shape.rounds == 0 else []
        for candidate in [*BACKENDS, *peer]:
            key = (candidate, precision)
            if key == ("reference", "bf16") and name != LM_STEP:
                continue
            row: dict[str, Any] = {"shape": name, "candidate": candidate, "precision": precision}
            rows.append(row)
            if candidate != PEER and (reason := unavailable(candidate, device)):
                row["not_timed"] = reason
            elif candidate != PEER and not agrees(candidate, shape, precision, device):
                row["not_timed"] = DISAGREES
            elif name == LM_STEP:
                steps[key] = lm_step(candidate, shape, precision, device)
            else:
                layer: nn.Module = (
                    nn.LSTM(shape.hidden, shape.hidden, device=device)
                    if candidate == PEER
                    else RecurrentLayer(shape.spec(), candidate, device)
                )
                steps[key] = layer_step(layer, shape, precision, device)
    products = {("product", p): large_product(p, device) for p in LARGEST_ERROR}
    times = take_turns(steps | {key: step for key, (step, _) in products.items()}, seconds, device)
    naive = median(times[PEER if name == LM_STEP else "reference", "fp32"])
    for row in rows:
        if "not_timed" in row:
            continue
        ms = times[row["candidate"], row["precision"]]
        row |= {
            "ms": median(ms),
            "min_ms": min(ms),
            "turns": len(ms),
            "x_naive": naive / median(ms),
        }
        row["tokens/s"] = 1000 * shape.steps * shape.batch / row["ms"]
        if name != LM_STEP:
            product = ("product", row["precision"])
            row["limit_ms"] = shape.operations() / products[product][1] * median(times[product])
            row["x_limit"] = row["ms"] / row["limit_ms"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = {"ms": ".1f", "min_ms": ".1f", "x_naive": ".2f", "x_limit": ".2f"}
    columns["tokens/s"] = ".0f"
    lines = [f"{'':<15}" + "".join(f"{name.replace('_', ' '):>10}" for name in columns)]
    for row in rows:
        cells = (f"{row[k]:{f}}" if k in row else "" for k, f in columns.items())
        text = "".join(f"{cell:>10}" for cell in cells)
        text = f"  not timed: {row['not_timed']}" if "not_timed" in row else text
        lines.append(f"{row['candidate']:<10}{row['precision']:<5}{text}")
    return "\n".join(lines)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = [line for line in info.open() if "model name" in line] if info.exists() else []
    model = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> int | str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ", ".join(SHAPES)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="NAME", help=names)
    parser.add_argument("--threads", type=int, help="of the CPU, default torch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=20, help="per table, default 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    for name in args.shape:
        if name not in SHAPES:
            return f"shape is {name!r}, it must be one of {names}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "device is cuda, but torch finds no CUDA device here"
    torch.set_num_threads(args.threads or torch.get_num_threads())
    header = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    header["device"] = device_name(args.device)
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    for name in args.shape:
        rows += (measured := measure(name, args.seconds, args.device))
        print(f"\n{name}: {SHAPES[name]}\n{table(measured)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    return int(any(row.get("not_timed") == DISAGREES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
