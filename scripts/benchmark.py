"""Time the project's kernels against their peers and the machine's limit.

    python scripts/benchmark.py                    # everything but the largest step
    python scripts/benchmark.py --what recurrence --shape h650-r5 --threads 1 2
    python scripts/benchmark.py --what step evaluate memory --json out.json
    python scripts/benchmark.py --what recurrence step --device cuda

recurrence  forward and backward of one layer. "reference" is the loop over time under autograd as
            the community writes it, "compiled" is torch.compile of that loop, left out if it has
            not finished after --compile-seconds
step        a whole training step of a language model: two tied layers, loss, gradient, clipping at
            0.25, SGD. The example is PyTorch's word_language_model with a plain LSTM; ours have
            rounds of mogrification
evaluate    scoring at batch 1, two layers of 650, 5 rounds, V = 10,000, on random tokens; "ptb
            test" is the time of PTB's test set, 82,430 tokens, at that rate
memory      how much a WikiText-2 step of the output layer (N 4,480, V 33,278, E 400) adds to the
            process's peak memory, beside the plain way's

The candidates of a table take turns in one process, after a first turn that is not timed; times
are medians. "x naive" is how many times faster than the reference (step: the example) in fp32,
"x limit" how many times longer than the operations take at the rate of a large product of the same
dtype, timed in the same turns. A candidate that disagrees with the reference is not timed; the
exit code is then 1.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from mogrifier_lm.data import IGNORE
from mogrifier_lm.evaluators import static_nats
from mogrifier_lm.kernels import cross_entropy as output_layer
from mogrifier_lm.kernels.graphs import Graphed
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.machine import cpu_model
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import OptimizerConfig
from mogrifier_lm.training.optim import build_optimizer

VOCAB, PTB_TEST = 10_000, 82_430
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.05}  # root mean square, relative
DISAGREES = "it disagrees with the reference"
COMPILED, LSTM, EXAMPLE = "compiled", "nn.LSTM", "example"
Step = Callable[[], Any]
Rows = list[dict[str, Any]]


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
STEPS = {"2x200-r5": Shape(35, 20, 200, 5), "2x912-r5-rank84": Shape(70, 64, 912, 5, 84)}


def autocast(precision: str, device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def agree(values: list[Tensor], expected: list[Tensor], precision: str) -> bool:
    pairs = zip(values, expected, strict=True)
    return all((v - e).norm() <= LARGEST_ERROR[precision] * e.norm() for v, e in pairs)


def measure(
    build: Callable[[str, str], Step | str],
    candidates: list[str],
    tokens: int,
    operations: int | None,
    seconds: float,
    device: str,
) -> Rows:
    """A row for each candidate and precision, the first candidate being the naive one.

    `build` makes a step, or says why there is none, as does its ValueError; "" leaves the row out.
    """
    rows: Rows = []
    steps: dict[tuple[str, str], Step] = {}
    for precision, candidate in itertools.product(LARGEST_ERROR, candidates):
        try:
            step = build(candidate, precision)
        except ValueError as reason:
            step = str(reason)
        if step:
            rows.append({"candidate": candidate, "precision": precision})
        if callable(step):
            steps[candidate, precision] = step
        elif step:
            rows[-1]["not timed"] = step
    products = {("product", p): large_product(p, device) for p in LARGEST_ERROR if operations}
    times = take_turns(
        steps | {k: product for k, (product, _) in products.items()}, seconds, device
    )
    for row in rows:
        key = (row["candidate"], row["precision"])
        if key not in times:
            continue
        row["ms"], row["turns"] = median(times[key]), len(times[key])
        row["tokens/s"] = 1000 * tokens / row["ms"]
        row["x naive"] = median(times[candidates[0], "fp32"]) / row["ms"]
        if operations:
            product = ("product", row["precision"])
            limit = operations / products[product][1] * median(times[product])
            row["x limit"] = row["ms"] / limit
    return rows


def table(rows: Rows) -> str:
    formats = {"ms": ".1f", "tokens/s": ".0f", "x limit": ".2f", "x naive": ".2f"}
    formats |= {"ptb test, s": ".0f", "MiB": ".0f", "x less": ".1f"}
    columns = {name: f for name, f in formats.items() if any(name in row for row in rows)}
    lines = [f"{'':<15}" + "".join(f"{name:>12}" for name in columns)]
    for row in rows:
        cells = (f"{row[name]:{f}}" if name in row else "" for name, f in columns.items())
        text = "".join(f"{cell:>12}" for cell in cells)
        text = f"  not timed: {row['not timed']}" if "not timed" in row else text
        lines.append(f"{row['candidate']:<10}{row['precision']:<5}{text}")
    return "\n".join(lines)


def large_product(precision: str, device: str) -> tuple[Step, int]:
    """A product that runs as fast as products do, and its operations."""
    n = 1024 if device == "cpu" else 8192
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b, out = torch.randn(3, n, n, device=device).to(dtype)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def take_turns(
    steps: dict[tuple[str, str], Step], seconds: float, device: str
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each step, over about `seconds` and at least 5 turns."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    first = 4 if device == "cuda" else 1  # turns that are not timed: a graph is captured in the 4th
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < first + 5 or time.perf_counter() < end:
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[key].append(1000 * (time.perf_counter() - start))
    return {key: ms[first:] for key, ms in times.items()}


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
    def build(name: str, precision: str) -> Step | str:
        def step_of(layer: Any, shape: Shape = shape, precision: str = precision) -> Step:
            return layer_step(layer, shape, precision, device)

        if name == LSTM:
            return step_of(nn.LSTM(shape.hidden, shape.hidden, device=device))
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
        return step_of(RecurrentLayer(shape.specs(1)[0], name, device))

    candidates = [*BACKENDS, *([] if shape.rounds else [LSTM]), COMPILED]
    tokens = shape.steps * shape.batch
    return measure(build, candidates, tokens, shape.operations(), seconds, device)


def example_step(shape: Shape, precision: str, device: str) -> Step:
    """A step of PyTorch's word_language_model example at this size, its dropout left out."""
    tokens, targets = torch.randint(VOCAB, (2, shape.steps, shape.batch), device=device)
    encoder = nn.Embedding(VOCAB, shape.hidden, device=device)
    decoder = nn.Linear(shape.hidden, VOCAB, device=device)
    nn.init.uniform_(encoder.weight, -0.1, 0.1)
    nn.init.zeros_(decoder.bias)
    decoder.weight = encoder.weight
    rnn = nn.LSTM(shape.hidden, shape.hidden, num_layers=2, device=device)
    model, criterion = nn.ModuleList([encoder, rnn, decoder]), nn.CrossEntropyLoss()
    hidden = tuple(torch.zeros(2, 2, shape.batch, shape.hidden, device=device))

    def step() -> None:
        nonlocal hidden
        model.zero_grad()
        hidden = tuple(h.detach() for h in hidden)
        with autocast(precision, device):
            output, hidden = rnn(encoder(tokens), hidden)
            loss = criterion(decoder(output).view(-1, VOCAB), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)

    return step


def language_model(backend: str, shape: Shape, device: str) -> LanguageModel:
    """The same weights at each call."""
    resolve(backend, device)
    torch.manual_seed(0)
    return LanguageModel(VOCAB, shape.hidden, shape.specs(2), backend=backend, device=device)


def our_step(backend: str, shape: Shape, precision: str, device: str) -> Step | str:
    """The trainer's step, captured as a graph on a GPU."""
    model = language_model(backend, shape, device)
    tokens, targets = torch.randint(VOCAB, (2, shape.steps, shape.batch), device=device)
    optimizer = build_optimizer(OptimizerConfig(name="sgd", lr=0.1), model.parameters())
    states = model.zero_states(shape.batch)

    def values(model: LanguageModel, loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    reference, few = language_model("reference", shape, device), (tokens[:3], targets[:3])
    hidden, _ = reference.encode(few[0], states)
    logits = linear(hidden, reference.output_weight, reference.output_bias)
    exact = cross_entropy(logits, few[1].flatten(), reduction="sum")
    with autocast(precision, device):
        loss, _ = model.loss(*few, states)
    if not agree(values(model, loss), values(reference, exact), precision):
        return DISAGREES

    def update() -> None:
        with autocast(precision, device):
            nats, new = model.loss(tokens, targets, states)
        optimizer.zero_grad(set_to_none=True)
        (nats / targets.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        with torch.no_grad():
            for old, state in zip(states, new, strict=True):
                old[0].copy_(state[0])
                old[1].copy_(state[1])

    return Graphed(update, torch.device(device))


def step(shape: Shape, device: str, seconds: float) -> Rows:
    def build(name: str, precision: str) -> Step | str:
        make = example_step if name == EXAMPLE else partial(our_step, name)
        return make(shape, precision, device)

    tokens = shape.steps * shape.batch
    return measure(build, [EXAMPLE, *BACKENDS], tokens, None, seconds, device)


def evaluate(tokens: int, device: str, seconds: float) -> Rows:
    shape = Shape(1, 1, 650, 5)

    def score(model: LanguageModel, tokens: int, precision: str = "fp32") -> float:
        ids = np.random.default_rng(0).integers(VOCAB, size=tokens)
        with autocast(precision, device):
            return static_nats(model, ids, 0).double().sum().item()

    def build(name: str, precision: str) -> Step | str:
        model, few = language_model(name, shape, device), 50
        exact = score(language_model("reference", shape, device), few)
        agrees = abs(score(model, few, precision) / exact - 1) <= LARGEST_ERROR["fp32"]
        return partial(score, model, tokens, precision) if agrees else DISAGREES

    rows = measure(build, list(BACKENDS), tokens, None, seconds, device)
    for row in rows:
        if "ms" in row:
            row["ptb test, s"] = PTB_TEST / row["tokens/s"]
    return rows


def added_peak(way: str, precision: str, device: str, threads: int) -> float:
    """MiB that a step of the output layer adds to the peak of this process."""
    torch.set_num_threads(threads)
    N, V = 70 * 64, 33_278
    hidden, weight = (torch.randn(n, 400, device=device) / 5 for n in (N, V))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        # Not getrusage's: that of a new process begins at its parent's.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10

    before = peak()
    with autocast(precision, device):
        name = "reference" if way == "plain" else output_layer.resolve("auto", device)
        loss = output_layer.BACKENDS[name].loss(hidden, weight, None, targets, None, IGNORE)
    loss.backward()
    return peak() - before


def memory(device: str) -> Rows:
    rows: Rows = []
    for precision, way in itertools.product(LARGEST_ERROR, ("plain", "chunked")):
        with multiprocessing.get_context("spawn").Pool(1) as process:  # a peak never falls
            job = (way, precision, device, torch.get_num_threads())
            rows.append({"candidate": way, "precision": precision})
            rows[-1]["MiB"] = process.apply(added_peak, job)
    for plain, chunked in (rows[:2], rows[2:]):
        chunked["x less"] = plain["MiB"] / chunked["MiB"]
    return rows


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> int | str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts, names = ("recurrence", "step", "evaluate", "memory"), [*RECURRENCES, *STEPS]
    add = parser.add_argument
    add("--what", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    some = names[:-1]  # the last takes minutes on a CPU
    add("--shape", nargs="+", choices=names, default=some, metavar="NAME", help=", ".join(names))
    add("--threads", nargs="+", type=int, help="of the CPU, each in turn; default torch's")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seconds", type=float, default=20, help="per table, default 20")
    add("--compile-seconds", type=int, default=60, help="default 60; 0 leaves it out")
    add("--tokens", type=int, default=1000, help="that evaluate scores, default 1000")
    add("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return "device is cuda, but torch finds no CUDA device here"
    d, s = args.device, args.seconds
    jobs: dict[tuple[str, str], Callable[[], Rows]] = {}
    for name in args.shape:
        if name in RECURRENCES:
            job = partial(recurrence, RECURRENCES[name], d, s, args.compile_seconds)
            jobs["recurrence", name] = job
        else:
            jobs["step", name] = partial(step, STEPS[name], d, s)
    jobs["evaluate", f"{args.tokens} tokens"] = partial(evaluate, args.tokens, d, s)
    jobs["memory", "wikitext-2"] = partial(memory, d)
    header = {"torch": torch.__version__, "python": platform.python_version()}
    header["device"] = device_name(d)
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows: Rows = []
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for (part, name), job in jobs.items():
            if part not in args.what:
                continue
            measured = job()
            print(f"\n{part} {name}, {threads} threads\n{table(measured)}", flush=True)
            place = {"part": part, "shape": name, "threads": threads}
            rows += [place | row for row in measured]
            if args.json:
                args.json.write_text(
                    json.dumps(header | {"rows": rows}, indent=1) + "\n", encoding="utf-8"
                )
    return int(any(row.get("not timed") == DISAGREES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
