"""Calls of every kernel with arguments of any dtype, size, stride, layout and device.

    python -m tests.kernels.fuzz --cases 10000 --seed 0

A case ends in the reference's numbers or in an error, never in other numbers, and never in the end
of the process: cases run in parts, each a process of its own. With the C++ compiled for the address
sanitizer, by a script asan-g++ that calls `g++ -fsanitize=address "$@"` and answers --version with
a line of its own, by which its libraries are told from others in the cache:

    CXX=./asan-g++ LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python -m tests.kernels.fuzz --cases 2000
"""

import argparse
import collections
import random
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from mogrifier_lm.cells import CellSpec
from mogrifier_lm.kernels import cross_entropy, recurrence

PART = 500  # cases of one process
ERRORS = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
# The largest difference, as a share of the largest entry, by the narrowest dtype of a case.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.2, torch.float16: 0.1}


def spread(t: Tensor, rng: random.Random) -> Tensor:
    """The same values with other strides, at another place of their memory."""
    kind = rng.randrange(7)
    if kind == 1 and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2 and t.dim():
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan")).to(t.dtype)
        return wide[..., 1::2].copy_(t)
    if kind == 3:
        return torch.full((t.numel() + 3,), float("nan")).to(t.dtype)[3:].view(t.shape).copy_(t)
    if kind == 4 and t.dim() and t.shape[0]:
        return t[:1].expand(t.shape)  # other values, stride 0
    if kind == 5 and t.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(t), -t).conj().imag
    return t


def damaged(t: Tensor, rng: random.Random) -> Tensor:
    """A tensor that may not fit: of another dtype, size, layout or device."""
    kind = rng.randrange(6)
    if kind == 0:
        return t.to("meta")
    if kind == 1 and t.dim() and t.shape[0]:
        return t[: rng.randrange(t.shape[0])]
    if kind == 2:
        return torch.cat([t, t], -1) if t.dim() else t
    if kind == 3 and t.is_floating_point():
        return t.to_sparse()
    if kind == 4:
        return t.unsqueeze(rng.randrange(t.dim() + 1))
    return t.to(rng.choice(DTYPES))


def size(rng: random.Random) -> int:
    return rng.choice([1, 1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 40, 0])


def varied(tensors: list[Tensor | None], rng: random.Random) -> list[Tensor | None]:
    """Some of them with other strides; in every second case one that may not fit."""
    found = [None if t is None else spread(t, rng) for t in tensors]
    if rng.random() < 0.5:
        i = rng.randrange(len(found))
        if (t := found[i]) is not None:
            found[i] = damaged(t, rng)
    return found


def recurrence_case(
    rng: random.Random, product: torch.dtype | None
) -> tuple[str, Callable[[str], list[Tensor]], list[Tensor]]:
    """A backend, a call by the name of one, and its inputs."""
    T, B, I, H = (size(rng) for _ in range(4))  # noqa: E741
    rounds = rng.randrange(7)
    dtype = rng.choice([torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.float16])
    if product:  # torch itself does not mix two kinds of 16 bits
        dtype = torch.float32
    low = product is not None or dtype.itemsize == 2
    rank = rng.choice([None, rng.randint(1, min(I, H))]) if min(I, H) else None
    spec = CellSpec(
        input_size=max(I, 1),
        hidden_size=max(H, 1),
        rounds=rounds,
        rank=rank,
        # The gradient of a cap jumps at ties, which rounding tips over.
        cell=rng.choice(["lstm", "lstm", "lstm", "mlstm", "lstm" if low else "rlstm"]),
        share_rounds=rng.random() < 0.3,
        zigzag=rng.random() < 0.7,
        round_bias=rng.random() < 0.7,
        bias=rng.random() < 0.7,
        cap_input_gate=not low and rng.random() < 0.3,
    )
    draw = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).mul(0.5).to(dtype)

    names = list(spec.shapes())
    mask = normal(rng.choice([1, T]), B, H).abs() if rng.random() < 0.4 else None
    tensors = [normal(T, B, I), normal(B, H), normal(B, H), mask]
    # Weights of a layer that forgets: in one that does not, low precision tells nothing.
    weights = [(normal(*s) / s[-1] ** 0.5).to(dtype) for s in spec.shapes().values()]
    tensors = varied([*tensors, *weights], rng)
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors if t is not None]
    if mask is not None:
        inputs[3].requires_grad_(False)
    grad, threads = rng.random() < 0.6, rng.choice([1, 2])

    def call(name: str) -> list[Tensor]:
        torch.set_num_threads(threads)
        rest = iter(inputs)
        x, h, c, m = (next(rest) if t is not None else None for t in tensors[:4])
        weights = spec.weights(dict(zip(names, rest, strict=True)))
        with torch.set_grad_enabled(grad):
            output, state = recurrence.run(name, x, (h, c), weights, spec.options, m)
        results = [output, *state]
        if grad:
            wanted = [p for p in inputs if p.requires_grad]
            loss = sum((r.float() * r.float()).sum() for r in results)
            results += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return results

    return (
        rng.choice([b for b in recurrence.BACKENDS if b not in ("reference", "triton")]),
        call,
        inputs,
    )


def output_case(
    rng: random.Random, product: torch.dtype | None
) -> tuple[str, Callable[[str], list[Tensor]], list[Tensor]]:
    """As `recurrence_case`, of the output layer."""
    N, E, V, M = size(rng), size(rng), size(rng) + 1, rng.choice([1, 1, 2, 3])
    dtype = rng.choice([torch.float32] * 6 + [torch.float64, torch.bfloat16])
    dtype = torch.float32 if product else dtype
    draw = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).mul(0.5).to(dtype)

    targets = torch.randint(V, (N,), generator=draw)
    if N and rng.random() < 0.3:
        targets[rng.randrange(N)] = rng.choice([-100, -1, V, 2**40])
    prior = normal(N, M).float().log_softmax(1) if M > 1 else None
    bias = normal(V) if rng.random() < 0.7 else None
    tensors = varied([normal(N * M, E), normal(V, E), bias, targets, prior], rng)
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors if t is not None]
    grad = rng.random() < 0.6

    def call(name: str) -> list[Tensor]:
        rest = iter(inputs)
        hidden, weight, b, t, p = (next(rest) if t is not None else None for t in tensors)
        kernel = cross_entropy.BACKENDS[name]
        with torch.set_grad_enabled(grad):
            loss = kernel.loss(hidden, weight, b, t, p, -100)
        results = [loss, kernel.token_nats(hidden, weight, b, t, p, -100)]
        if grad:
            wanted = [p for p in inputs if p.requires_grad]
            results += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return results

    return rng.choice(["chunked", "native"]), call, inputs


def outcome(seed: int, number: int) -> str:
    """What became of a case: "equal", the error in a word, or "WRONG" and how."""
    rng = random.Random(f"{seed} {number}")
    product = rng.choice([None, None, torch.bfloat16, torch.float16])
    backend, call, inputs = rng.choice([recurrence_case] * 3 + [output_case])(rng, product)
    with torch.autocast("cpu", product, enabled=product is not None):
        try:
            values = call(backend)
        except ERRORS as error:
            return f"{backend}: {type(error).__name__}"
        try:
            expected = call("reference")
        except ERRORS as error:
            return f"{backend}: WRONG, case {number} is the reference's error {error!r}"[:200]
    floats = [t.dtype for t in inputs if t.is_floating_point()]
    tolerance = max(TOLERANCE[d] for d in (*floats, *([product] if product else [])))
    # What cancels, p - 1 say, keeps the rounding of numbers near 1, which in 16 bits is 2^-8.
    floor = 0.05 if tolerance >= 0.1 else 1e-2
    for value, e in zip(values, expected, strict=True):
        if value.is_meta:
            continue
        if value.shape != e.shape:
            return f"{backend}: WRONG, case {number} has shape {value.shape}, not {e.shape}"
        scale = e.double().abs().max().item() if e.numel() else 0.0
        difference = (value.double() - e.double()).abs().max().item() if e.numel() else 0.0
        if not difference <= tolerance * (scale + floor):
            return f"{backend}: WRONG, case {number} is off by {difference:.2g} of {scale:.2g}"
    return f"{backend}: equal"


def run(seed: int, first: int, cases: int) -> collections.Counter[str]:
    """How often each outcome was met."""
    return collections.Counter(outcome(seed, n) for n in range(first, first + cases))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    if args.cases <= PART:
        found = run(args.seed, args.first, args.cases)
        for what, times in sorted(found.items()):
            print(f"{times}\t{what}")
        return int(any("WRONG" in what for what in found))
    found, bad = collections.Counter[str](), 0
    for first in range(args.first, args.first + args.cases, PART):
        count = min(PART, args.first + args.cases - first)
        numbers = [f"--seed={args.seed}", f"--first={first}", f"--cases={count}"]
        command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.fuzz", *numbers]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            bad = 1
            print(f"{numbers}: exit {done.returncode}: {done.stderr.strip()[-600:]}", flush=True)
        for line in done.stdout.splitlines():
            count_of, _, what = line.partition("\t")
            found[what] += int(count_of)
    for what, times in sorted(found.items()):
        print(f"{times}\t{what}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
