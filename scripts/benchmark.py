"""Time the project's kernels against their peers and the machine's limit.

    python scripts/benchmark.py                                   # everything, torch's threads
    python scripts/benchmark.py recurrence --shape h650-r5 --threads 1 2
    python scripts/benchmark.py step evaluate memory --json out.json
    python scripts/benchmark.py recurrence step --device cuda

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
import json
import math
import multiprocessing
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mogrifier_lm.cells import CellSpec, RecurrentLayer
from mogrifier_lm.config import OptimizerConfig, StaticConfig
from mogrifier_lm.data import Split
from mogrifier_lm.evaluators.static import static
from mogrifier_lm.graphs import Graphed
from mogrifier_lm.kernels.cross_entropy import linear_cross_entropy
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.optim import build_optimizer

VOCAB, PTB_TEST = 10_000, 82_430
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.05}  # root mean square, relative
DISAGREES = "it disagrees with the reference"
COMPILED, LSTM, EXAMPLE = "compiled", "nn.LSTM", "example"
Step = Callable[[], Any]


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
        return layer_specs(self.hidden, self.hidden, layers, rounds=self.rounds, rank=self.rank)

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


class Table:
    """Rows of one table: candidates are added, then timed by turns."""

    def __init__(self, what: str, shape: str, device: str) -> None:
        self.what, self.shape, self.device = what, shape, device
        self.rows: list[dict[str, Any]] = []
        self.steps: dict[tuple[str, str], Step] = {}

    def add(self, candidate: str, precision: str, build: Callable[[], Step | str]) -> None:
        """`build` makes a step, or says why there is none; so does its ValueError."""
        row = {"what": self.what, "shape": self.shape, "candidate": candidate}
        self.rows.append(row | {"precision": precision})
        try:
            step = build()
        except ValueError as reason:
            step = str(reason)
        if isinstance(step, str):
            self.rows[-1]["not timed"] = step
        else:
            self.steps[candidate, precision] = step

    def measure(self, naive: str, tokens: int, operations: int | None, seconds: float) -> None:
        products = {}
        if operations:
            products = {("product", p): large_product(p, self.device) for p in LARGEST_ERROR}
        times = take_turns(
            self.steps | {k: s for k, (s, _) in products.items()}, seconds, self.device
        )
        for row in self.rows:
            key = (row["candidate"], row["precision"])
            if key not in times:
                continue
            row["ms"], row["turns"] = median(times[key]), len(times[key])
            row["tokens/s"] = 1000 * tokens / row["ms"]
            row["x naive"] = median(times[naive, "fp32"]) / row["ms"]
            if operations:
                product = ("product", row["precision"])
                row["x limit"] = row["ms"] / median(times[product])
                row["x limit"] *= products[product][1] / operations

    def __str__(self) -> str:
        formats = {"ms": ".1f", "tokens/s": ".0f", "x limit": ".2f", "x naive": ".2f"}
        formats |= {"ptb test, s": ".0f", "MiB": ".0f", "x less": ".1f"}
        columns = {k: f for k, f in formats.items() if any(k in row for row in self.rows)}
        lines = [f"{'':<15}" + "".join(f"{name:>12}" for name in columns)]
        for row in self.rows:
            text = "".join(f"{f'{row[k]:{f}}' if k in row else '':>12}" for k, f in columns.items())
            if reason := row.get("not timed"):
                text = f"  not timed: {reason}"
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
    state = torch.zeros(size[1:] if isinstance(layer, RecurrentLayer) else (1, *size[1:]))
    inputs = [x.requires_grad_(), *layer.parameters()]
    state = state.to(device)

    def step() -> list[Tensor]:
        with autocast(precision, device):
            output, _ = layer(x, (state, state))
        return [output.detach(), *torch.autograd.grad(output, inputs, d_output.to(output.dtype))]

    return step


def compiled_step(shape: Shape, device: str, limit: int) -> Step | str:
    """The reference under torch.compile, unless that takes longer than `limit` seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    layer = RecurrentLayer(shape.specs(1)[0], "reference", device)
    step = layer_step(torch.compile(layer), shape, "fp32", device)  # type: ignore[arg-type]
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        step()
    except Exception as error:  # whatever torch.compile makes of it
        return f"torch.compile had not finished after {limit} s ({type(error).__name__})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return step


def recurrence(name: str, device: str, seconds: float, compile_seconds: int) -> Table:
    shape, table = RECURRENCES[name], Table("recurrence", name, device)

    def ours(backend: str, precision: str) -> Step | str:
        resolve(backend, device)
        layers = [
            RecurrentLayer(shape.small.specs(1)[0], b, device) for b in ("reference", backend)
        ]
        layers[1].load_state_dict(layers[0].state_dict())
        expected = layer_step(layers[0], shape.small, "fp32", device)()
        if not agree(layer_step(layers[1], shape.small, precision, device)(), expected, precision):
            return DISAGREES
        return layer_step(
            RecurrentLayer(shape.specs(1)[0], backend, device), shape, precision, device
        )

    for precision in LARGEST_ERROR:
        for backend in BACKENDS:
            table.add(backend, precision, lambda b=backend, p=precision: ours(b, p))
        if shape.rounds == 0:
            lstm = nn.LSTM(shape.hidden, shape.hidden, device=device)
            table.add(LSTM, precision, lambda p=precision, m=lstm: layer_step(m, shape, p, device))
        if precision == "fp32" and compile_seconds:
            table.add(COMPILED, precision, lambda: compiled_step(shape, device, compile_seconds))
    table.measure("reference", shape.steps * shape.batch, shape.operations(), seconds)
    return table


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


def our_step(backend: str, shape: Shape, precision: str, device: str) -> Step | str:
    """The trainer's step, captured as a graph on a GPU."""
    resolve(backend, device)
    model = LanguageModel(VOCAB, shape.hidden, shape.specs(2), backend=backend, device=device)
    tokens, targets = torch.randint(VOCAB, (2, shape.steps, shape.batch), device=device)
    optimizer = build_optimizer(OptimizerConfig(name="sgd", lr=0.1), model.parameters())
    states = model.zero_states(shape.batch)

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    reference = LanguageModel(
        VOCAB, shape.hidden, shape.specs(2), backend="reference", device=device
    )
    model.load_state_dict(reference.state_dict())
    few = tokens[:3], targets[:3]
    hidden, _ = reference.encode(few[0], states)
    logits = linear(hidden, reference.embedding_weight, reference.output_bias)
    loss = cross_entropy(logits, few[1].flatten(), reduction="sum")
    expected = [loss.detach(), *torch.autograd.grad(loss, list(reference.parameters()))]
    with autocast(precision, device):
        loss, _ = model.loss(*few, states)
    if not agree(gradients(loss), expected, precision):
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


def step(name: str, device: str, seconds: float) -> Table:
    shape, table = STEPS[name], Table("step", name, device)
    for precision in LARGEST_ERROR:
        table.add(EXAMPLE, precision, lambda p=precision: example_step(shape, p, device))
        for b in BACKENDS:
            table.add(b, precision, lambda b=b, p=precision: our_step(b, shape, p, device))
    table.measure(EXAMPLE, shape.steps * shape.batch, None, seconds)
    return table


def evaluate(tokens: int, device: str, seconds: float) -> Table:
    table = Table("evaluate", f"{tokens} tokens", device)
    ids = np.random.default_rng(0).integers(VOCAB, size=tokens)
    split, shape = Split(ids=ids, words=tokens, bytes=tokens, sha256=""), Shape(1, 1, 650, 5)
    reference = LanguageModel(
        VOCAB, shape.hidden, shape.specs(2), backend="reference", device=device
    )

    def ours(backend: str, precision: str) -> Step | str:
        resolve(backend, device)
        model = LanguageModel(VOCAB, shape.hidden, shape.specs(2), backend=backend, device=device)
        model.load_state_dict(reference.state_dict())

        def score(model: LanguageModel = model, split: Split = split) -> float:
            with autocast(precision, device):
                return static(model, split, 0, StaticConfig()).nats

        few = Split(ids=ids[:100], words=100, bytes=100, sha256="")
        exact = static(reference, few, 0, StaticConfig()).nats
        return score if abs(score(split=few) / exact - 1) <= LARGEST_ERROR["fp32"] else DISAGREES

    for precision in LARGEST_ERROR:
        for backend in BACKENDS:
            table.add(backend, precision, lambda b=backend, p=precision: ours(b, p))
    table.measure("reference", tokens, None, seconds)
    for row in table.rows:
        if "ms" in row:
            row["ptb test, s"] = PTB_TEST / row["tokens/s"]
    return table


def added_peak(way: str, precision: str, device: str, threads: int) -> float:
    """MiB that a step of the output layer adds to the peak of this process."""
    torch.set_num_threads(threads)
    hidden, weight = (
        torch.randn(70 * 64, 400, device=device),
        torch.randn(33_278, 400, device=device),
    )
    hidden, weight = hidden.requires_grad_(), (weight / 20).requires_grad_()
    targets = torch.randint(33_278, (70 * 64,), device=device)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    before = peak()
    with autocast(precision, device):
        if way == "plain":
            loss = cross_entropy(linear(hidden, weight), targets, reduction="sum")
        else:
            loss = linear_cross_entropy(hidden, weight, None, targets)
    loss.backward()
    return peak() - before


def memory(device: str) -> Table:
    table = Table("memory", "wikitext-2", device)
    for precision in LARGEST_ERROR:
        for way in ("plain", "chunked"):
            with multiprocessing.get_context("spawn").Pool(1) as process:  # a peak never falls
                job = (way, precision, device, torch.get_num_threads())
                mib = process.apply(added_peak, job)
            row = {
                "what": "memory",
                "shape": "wikitext-2",
                "candidate": way,
                "precision": precision,
            }
            table.rows.append(row | {"MiB": mib})
    for plain, chunked in (table.rows[:2], table.rows[2:]):
        chunked["x less"] = plain["MiB"] / chunked["MiB"]
    return table


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = [line for line in info.open() if "model name" in line] if info.exists() else []
    model = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> int | str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("recurrence", "step", "evaluate", "memory")
    parser.add_argument("what", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all")
    names = ", ".join([*RECURRENCES, *STEPS])
    parser.add_argument("--shape", nargs="+", metavar="NAME", help=f"of {names}; all")
    parser.add_argument("--threads", nargs="+", type=int, help="of the CPU, each in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=20, help="per table, default 20")
    parser.add_argument(
        "--compile-seconds", type=int, default=60, help="0 leaves it out; default 60"
    )
    parser.add_argument(
        "--tokens", type=int, default=1000, help="that evaluate scores, default 1000"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    shapes = args.shape or [*RECURRENCES, *STEPS]
    for given, known in ((args.what, parts), (shapes, [*RECURRENCES, *STEPS])):
        if unknown := set(given) - set(known):
            return f"{unknown.pop()!r} must be one of {', '.join(known)}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "device is cuda, but torch finds no CUDA device here"
    what, d, s = args.what or parts, args.device, args.seconds
    jobs: list[Callable[[], Table]] = []
    if "recurrence" in what:
        chosen = [n for n in RECURRENCES if n in shapes]
        jobs += [lambda n=n: recurrence(n, d, s, args.compile_seconds) for n in chosen]
    if "step" in what:
        jobs += [lambda n=n: step(n, d, s) for n in STEPS if n in shapes]
    jobs += [lambda: evaluate(args.tokens, d, s)] if "evaluate" in what else []
    jobs += [lambda: memory(d)] if "memory" in what else []
    header = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(d),
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    rows: list[dict[str, Any]] = []
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for job in jobs:
            table = job()
            rows += [row | {"threads": threads} for row in table.rows]
            print(f"\n{table.what} {table.shape}, {threads} threads\n{table}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    return int(any(row.get("not timed") == DISAGREES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
