"""How fast a config trains and scores on this machine, from random tokens and a few windows."""

import itertools
import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mogrifier_lm.config import Config
from mogrifier_lm.data import ORDERS, Corpus
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.evaluators.static import static_score
from mogrifier_lm.evaluators.task import Task, Text
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training.optim import build_averaging, build_optimizer
from mogrifier_lm.training.trainer import Trainer


def trainer_on_random_tokens(config: Config, vocabulary: int, device: str) -> Trainer:
    """A trainer as a run has it, which is not to save.

    Args:
        config: of the run.
        vocabulary: types that the random tokens are of.
        device: where it computes.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, vocabulary, device)
    size = config.trainer.batch_size * config.trainer.bptt * 50
    ids = np.random.default_rng(0).integers(0, vocabulary, size).astype(np.uint32)
    return Trainer(
        model=model,
        train=ORDERS[config.trainer.streams](ids, config.trainer.batch_size, 0),
        optimizer=build_optimizer(config.optimizer, model.parameters()),
        averaging=build_averaging(config.optimizer, model.parameters(), None),
        regularization=config.regularization,
        config=config.trainer,
        validate=lambda: Score(nats=0.0, tokens=1, words=1, bytes=1),
        files=RunFolder(os.devnull),
        seed=config.seed,
    )


def wait(device: str | torch.device) -> None:
    """Wait until a device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def training_speed(trainer: Trainer, seconds: float) -> float:
    """How fast a trainer is, after the steps in which a GPU captures its graphs.

    Args:
        trainer: trains on meanwhile.
        seconds: to measure for, about.

    Returns:
        Tokens a second.
    """
    first, least = (6, 5) if trainer.device.type == "cuda" else (1, 2)
    for _ in range(first):
        trainer.step()
    wait(trainer.device)
    began, tokens, steps = time.perf_counter(), trainer.progress.tokens, 0
    while steps < least or time.perf_counter() - began < seconds:
        trainer.step()
        steps += 1
        if steps % 5 == 0:
            wait(trainer.device)  # the host may be far ahead
    wait(trainer.device)
    return (trainer.progress.tokens - tokens) / (time.perf_counter() - began)


def validation_seconds(config: Config, model: LanguageModel, corpus: Corpus) -> float:
    """What one validation while training takes, once what is captured has been.

    Args:
        config: its streams and precision.
        model: on its device.
        corpus: its validation text is scored.

    Returns:
        Seconds.
    """
    valid, eos_id = corpus.splits["valid"], corpus.tokenizer.eos_id
    streams = min(config.trainer.valid_batch_size, len(valid.ids))
    device, low = model.output_bias.device.type, config.trainer.precision == "bf16"
    times = []
    for _ in range(3 if device == "cuda" else 2):  # the last windows' graph is made in the second
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False):
            static_score(model, valid, eos_id, streams)
        times.append(time.perf_counter() - began)
    return times[-1]


def scoring_seconds(config: Config, model: LanguageModel, corpus: Corpus, tokens: int) -> float:
    """What all evaluators take on both splits, tuning included.

    Args:
        config: its evaluators.
        model: on its device.
        corpus: texts that would be scored.
        tokens: of the validation text that are scored to judge by.

    Returns:
        Seconds.
    """
    total, valid = 0.0, corpus.splits["valid"]
    chosen = config.evaluators.chosen()
    needed = [name for evaluator in chosen.values() for name in evaluator.needs]
    splits = {**corpus.splits, "valid": replace(valid, ids=valid.ids[:tokens])}
    task = Task(model, splits, corpus.tokenizer.eos_id, config.regularization, needed)
    text = Text("valid", splits["valid"])
    for evaluator in chosen.values():
        values: dict[str, Any] = dict(vars(evaluator))
        tune_tokens = values.pop("tune_tokens", None) or len(valid.ids)
        grid = {k: v for k, v in values.items() if isinstance(v, list) and k != "temperature"}
        first = {k: v[0] if isinstance(v, list) else v for k, v in values.items()}
        for _ in range(2):  # the second time what is shared is there, and what is captured
            began = time.perf_counter()
            list(evaluator.score(task, text, [first]))
            seconds = time.perf_counter() - began
        trials = len(list(itertools.product(*grid.values())))
        tuned = trials * tune_tokens if any(isinstance(v, list) for v in values.values()) else 0
        scored = sum(len(corpus.splits[name].ids) for name in ("valid", "test")) + tuned
        total += seconds * scored / len(text)
    return total
