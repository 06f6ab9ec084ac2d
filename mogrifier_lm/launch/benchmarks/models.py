"""Whole models: the trainer's step beside PyTorch's example, scoring, memory."""

import gc
import itertools
import math
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mogrifier_lm.config import validate
from mogrifier_lm.data import IGNORE, Split
from mogrifier_lm.evaluators.dynamic import Dynamic
from mogrifier_lm.evaluators.static import static_nats
from mogrifier_lm.evaluators.task import Task, Text
from mogrifier_lm.kernels import cross_entropy as output_layer
from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.launch.benchmarks.layers import Shape
from mogrifier_lm.launch.benchmarks.timing import (
    DISAGREES,
    LARGEST_ERROR,
    Rows,
    Step,
    agree,
    autocast,
    captured,
    kernels,
    measure,
)
from mogrifier_lm.launch.job import compose
from mogrifier_lm.launch.speed import trainer_on_random_tokens, wait
from mogrifier_lm.model import LanguageModel

VOCAB, PTB_VALID, PTB_TEST = 10_000, 73_760, 82_430
EXAMPLE, CAPTURED = "example", "its graph"  # PyTorch's, with torch.nn.LSTM
STEPS = {"2x200-r5": Shape(35, 20, 200, 5), "2x912-r5-rank84": Shape(70, 64, 912, 5, 84)}
RECIPES = {
    "ptb_lstm_24m": 10_000,
    "ptb_mogrifier_24m": 10_000,
    "ptb_awd_lstm": 10_000,
    "wt2_lstm_35m": 33_278,
    "wt2_mogrifier_35m": 33_278,
}  # → vocabulary


def example_step(
    shape: Shape, precision: str, device: str, vocabulary: int = VOCAB, graph: bool = False
) -> Step:
    """A step of PyTorch's word_language_model example at this size, its dropout left out."""
    size = shape.steps, shape.batch
    tokens, targets = torch.randint(vocabulary, (2, *size), device=device)
    encoder = nn.Embedding(vocabulary, shape.hidden, device=device)
    decoder = nn.Linear(shape.hidden, vocabulary, device=device)
    nn.init.uniform_(encoder.weight, -0.1, 0.1)
    nn.init.zeros_(decoder.bias)
    decoder.weight = encoder.weight
    rnn = nn.LSTM(shape.hidden, shape.hidden, num_layers=2, device=device)
    model, criterion = nn.ModuleList([encoder, rnn, decoder]), nn.CrossEntropyLoss()
    hidden = tuple(torch.zeros(2, 2, shape.batch, shape.hidden, device=device))

    def step() -> None:
        model.zero_grad()
        with autocast(precision, device):
            output, new = rnn(encoder(tokens), hidden)
            loss = criterion(decoder(output).view(-1, vocabulary), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for p in model.parameters():
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.1)
        for old, state in zip(hidden, new, strict=True):
            old.copy_(state.detach())

    return captured(step, device) if graph else step


def language_model(backend: str, shape: Shape, device: str) -> LanguageModel:
    """The same weights at each call."""
    resolve(backend, device)
    torch.manual_seed(0)
    return LanguageModel(VOCAB, shape.hidden, shape.specs(2), backend=backend, device=device)


def agrees(backend: str, shape: Shape, precision: str, device: str) -> bool:
    """Whether the loss of a few steps and its gradient are those of the reference."""
    model, reference = (language_model(name, shape, device) for name in (backend, "reference"))
    tokens, targets = torch.randint(VOCAB, (2, 3, shape.batch), device=device)

    def values(model: LanguageModel, loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    hidden, _ = reference.encode(tokens, reference.zero_states(shape.batch))
    logits = linear(hidden, reference.output_weight, reference.output_bias)
    exact = cross_entropy(logits, targets.flatten(), reduction="sum")
    with autocast(precision, device):
        loss, _ = model.loss(tokens, targets, model.zero_states(shape.batch))
    return agree(values(model, loss), values(reference, exact), precision)


def trained_step(overrides: list[str], vocabulary: int, precision: str, device: str) -> Step:
    """The trainer's own step, of the config of `python train.py OVERRIDES`."""
    given = ["tracker=none", f"trainer.precision={precision}", f"trainer.device={device}"]
    config = validate(compose([*overrides, *given]))
    return trainer_on_random_tokens(config, vocabulary, device).step


def step(shape: Shape, device: str, seconds: float) -> Rows:
    """Ours at the size of the example, without dropout, with its optimizer."""
    sizes = [
        f"model.hidden_size={shape.hidden}", f"model.rounds={shape.rounds}", "model.num_layers=2",
        f"model.rank={shape.rank or 'null'}", f"trainer.batch_size={shape.batch}",
        f"trainer.bptt={shape.steps}", "trainer.clip=0.25", "trainer.lr_decay=none",
        "optimizer=sgd", "optimizer.lr=0.1", "regularization=none",
    ]  # fmt: skip

    def build(name: str, precision: str) -> Step | str:
        if name in (EXAMPLE, CAPTURED):
            return example_step(shape, precision, device, graph=name == CAPTURED)
        if not agrees(name, shape, precision, device):
            return DISAGREES
        return trained_step([*sizes, f"model.backend={name}"], VOCAB, precision, device)

    peers = [EXAMPLE, CAPTURED] if device == "cuda" else [EXAMPLE]
    tokens = shape.steps * shape.batch
    return measure(build, [*peers, *BACKENDS], tokens, None, seconds, device)


def recipe(name: str, device: str, seconds: float, profile: bool) -> Rows:
    """A recipe's whole step, with its dropout, optimizer and averages, beside the example.

    The example has two layers of torch.nn.LSTM and as many parameters. MiB: of the device.
    """
    vocabulary, steps, used = (
        RECIPES[name],
        dict[tuple[str, str], Step](),
        dict[tuple[str, str], float](),
    )
    t = validate(compose([f"experiment={name}"])).trainer
    budget = 35e6 if "wt2" in name else 24e6
    half = (vocabulary + 16) / 32  # of 16 H^2 + (V + 16) H + V = parameters
    hidden = int(math.sqrt(half**2 + (budget - vocabulary) / 16) - half)
    shape = Shape(t.bptt, t.batch_size, hidden, 0)
    peers = [EXAMPLE, CAPTURED] if device == "cuda" else [EXAMPLE]

    def build(candidate: str, precision: str) -> Step | str:
        before = _used(device)
        if candidate in peers:
            graph = candidate == CAPTURED
            made = example_step(shape, precision, device, vocabulary, graph)
        else:
            overrides = [f"experiment={name}", f"model.backend={candidate}"]
            overrides += ["trainer.variable_bptt=false"]  # one length, of which graphs are made
            made = trained_step(overrides, vocabulary, precision, device)
        steps[candidate, precision] = made
        for _ in range(5 if device == "cuda" else 0):
            made()
        used[candidate, precision] = _used(device) - before
        return made

    rows = measure(
        build, [*peers, "fused", "auto"], shape.steps * shape.batch, None, seconds, device
    )
    for row in rows:
        key = row["candidate"], row["precision"]
        row["MiB"] = used[key]
        if profile and device == "cuda" and row["precision"] == "bf16":
            print(f"\n{' '.join(key)}: {kernels(steps[key])}")
    return rows


def _used(device: str) -> float:
    """MiB of a GPU that are taken; 0 on a CPU, where `memory` measures."""
    gc.collect()
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


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
            row["ptb, s"] = PTB_TEST / row["tokens/s"]
    return rows


def recipe_scoring(name: str, tokens: int, device: str) -> Rows:
    """Static scoring in one stream, validation in 128, and dynamic evaluation at one setting.

    A validation has the recipe's precision, scores are fp32. "ptb, s": of the test set, of a
    validation, of both splits, at the rate of so many tokens, rounded up to whole windows: one of
    another length would be captured while it is timed.
    """
    config = validate(compose([f"experiment={name}", "tracker=none", f"trainer.device={device}"]))
    model = trainer_on_random_tokens(config, RECIPES[name], device).model
    tokens = 512 * max(5, math.ceil(tokens / 512))
    ids = np.random.default_rng(0).integers(RECIPES[name], size=max(tokens, 128 * 64 * 5))
    text = Text("test", Split(ids=ids[:tokens], words=tokens, bytes=tokens, sha256=""))
    task = Task(model, {"train": text.split, "test": text.split}, 0)
    dynamic = Dynamic(lr=[1e-4], decay=[1e-3], statistics_tokens=1000)
    setting = {k: v[0] if isinstance(v, list) else v for k, v in vars(dynamic).items()}

    def adapt() -> None:
        list(dynamic.score(task, text, [setting]))

    def validate_once() -> None:
        with autocast("bf16", device):
            static_nats(model, ids, 0, 128, 64)

    ways: dict[str, tuple[int, int, Step]] = {
        "static": (tokens, PTB_TEST, lambda: static_nats(model, text.split.ids, 0)),
        "valid 128": (len(ids), PTB_VALID, validate_once),
        "dynamic": (
            tokens,
            PTB_VALID + PTB_TEST,
            lambda: list(dynamic.score(task, text, [setting])),
        ),
    }
    rows: Rows = []
    for way, (scored, split, run) in ways.items():
        for _ in range(2):  # the second time all is captured
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            seconds = time.perf_counter() - began
        precision = "bf16" if way == "valid 128" else "fp32"
        row = {"candidate": way, "precision": precision, "ms": 1000 * seconds}
        rows.append(row | {"tokens/s": scored / seconds, "ptb, s": split * seconds / scored})
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
    loss.backward()  # type: ignore[no-untyped-call]
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
