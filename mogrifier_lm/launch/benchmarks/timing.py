"""Candidates that take turns, and the table of their times."""

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.kernels.graphs import Graphed

LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.05}  # root mean square, relative
DISAGREES = "it disagrees with the reference"
Step = Callable[[], Any]
Rows = list[dict[str, Any]]


def autocast(precision: str, device: str) -> torch.autocast:
    """What a step computes in: bf16 products, or none."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def agree(values: list[Tensor], expected: list[Tensor], precision: str) -> bool:
    """Whether tensors are the expected ones, as far as the precision lets them be."""
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
    """Time candidates against each other, in each precision.

    Args:
        build: (candidate, precision) → a step, or why there is none, which its ValueError may say
            too; "" leaves the row out.
        candidates: names, the naive one first.
        tokens: of a step.
        operations: of its products, for the machine's limit; None: not known.
        seconds: for all together, about.
        device: "cpu" or "cuda".

    Returns:
        A row for each candidate and precision: milliseconds (median), turns, tokens a second, and
        ratios to the naive candidate and to the limit.
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
    """Rows of `measure` and its like as lines of text."""
    formats = {"ms": ".1f", "tokens/s": ".0f", "x limit": ".2f", "x naive": ".2f"}
    formats |= {"ptb, s": ".1f", "MiB": ".0f", "x less": ".1f"}
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
    """Run steps in turns, so that what else the machine does meets all alike.

    Args:
        steps: name → step.
        seconds: for all together, about; each has at least 5 turns.
        device: "cpu" or "cuda".

    Returns:
        Name → milliseconds of each turn.
    """
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


def captured(step: Step, device: str) -> Step:
    """The step without what it returns, on a GPU as one graph."""

    def effects() -> None:
        step()

    return Graphed(effects, torch.device(device))


def kernels(step: Step) -> str:
    """How many kernels a step launches on a GPU, and how they share its time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1.0
    lines = [f"{sum(event.count for event in events):,} kernels, {total / 1000:.2f} ms of them"]
    for event in events[:12]:
        time_us = event.self_device_time_total
        each = f"{event.count:7,} x {time_us / event.count:7.1f} us"
        lines.append(f"{time_us / total:6.1%} {each}  {event.key[:60]}")
    return "\n".join(lines)
