"""Builders: the only place that makes objects out of a config, or out of a run's folder."""

import dataclasses
import logging
import math
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from mogrifier_lm.cells import CellSpec
from mogrifier_lm.config import Config, load_config
from mogrifier_lm.data import Corpus, Tokenizer, load_corpus, load_tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json
from mogrifier_lm.machine import lent_cores
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.training import checkpoint

log = logging.getLogger(__name__)

# Before a run of a sweep has set another number. A launcher that divides the cores says so by
# OMP_NUM_THREADS; else what SLURM has lent counts, not the node's cores.
DEFAULT_THREADS = (
    lent_cores()
    if "SLURM_CPUS_PER_TASK" in os.environ and "OMP_NUM_THREADS" not in os.environ
    else torch.get_num_threads()
)


def use_threads(asked: int | None) -> None:
    """Let torch compute with so many threads; None is what the machine or the launcher lends."""
    torch.set_num_threads(asked or DEFAULT_THREADS)


def saved_tokenizer_path(run_dir: Path) -> Path:
    path = run_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer.json in {run_dir}: the run ended before its data was read")
    return path


def saved_tokenizer(run_dir: Path) -> Tokenizer:
    return load_tokenizer(saved_tokenizer_path(run_dir))


def build_corpus(config: Config) -> Corpus:
    """The corpus of a config; the vocabulary of a run is that run's tokenizer."""
    tokenizer = config.tokenizer
    if tokenizer.vocabulary and Path(tokenizer.vocabulary).is_dir():
        path = saved_tokenizer_path(Path(tokenizer.vocabulary))
        tokenizer = dataclasses.replace(tokenizer, vocabulary=str(path))
    return load_corpus(config.data, tokenizer)


def saved_corpus(run_dir: Path, config: Config | None = None) -> Corpus:
    """The corpus that a run was trained on; `config` is the run's, default as it was saved.

    Raises:
        UserError: what is found now is another text, or is cut into other tokens.
    """
    config = config or load_config(run_dir)
    corpus = build_corpus(config)
    known = read_json(run_dir / "provenance.json", required=True)["data"]["sha256"]
    for name, split in corpus.splits.items():
        if split.sha256 != known[name]:
            raise UserError(
                f"{run_dir}: the {name} text is not the one of the run: give its data.dir"
            )
    if corpus.tokenizer.vocabulary != saved_tokenizer(run_dir).vocabulary:
        raise UserError(f"{run_dir} was made with another version of sentencepiece: other tokens")
    return corpus


def build_model(config: ModelConfig, vocab_size: int, device: str = "cpu") -> LanguageModel:
    """The model of a config, with fresh weights.

    With `num_params` the hidden size is the largest whose model fits the budget.
    """

    def build(hidden_size: int, device: str) -> LanguageModel:
        embedding_size = config.embedding_size or max(
            1, round(config.embedding_ratio * hidden_size)
        )
        top_size = config.top_hidden_size or hidden_size
        sizes = [embedding_size, *[hidden_size] * (config.num_layers - 1), top_size]
        options = {f.name: vars(config).get(f.name, f.default) for f in fields(CellSpec)}
        del options["input_size"], options["hidden_size"]
        specs = layer_specs(sizes, **options)
        return LanguageModel(
            vocab_size,
            embedding_size,
            specs,
            tie_embeddings=config.tie_embeddings,
            skip_sum=config.skip_sum,
            residual=config.residual,
            mixture=config.mixture,
            backend="auto" if device == "meta" else config.backend,
            device=device,
        )

    try:
        if config.hidden_size is not None:
            return build(config.hidden_size, device)
        assert config.num_params is not None
        low = math.ceil((config.rank or 1) / min(1, config.embedding_ratio))
        high = 2 * low
        while build(high, "meta").num_params() <= config.num_params:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if build(middle, "meta").num_params() <= config.num_params:
                low = middle
            else:
                high = middle
        if build(low, "meta").num_params() > config.num_params:
            raise ValueError(
                f"num_params is {config.num_params:g}, too few for a vocabulary of {vocab_size}"
            )
        return build(low, device)
    except ValueError as error:
        raise UserError(f"model.{error}") from error


@torch.no_grad()
def start_bias(model: LanguageModel, ids: np.ndarray) -> None:
    """Set the output bias to the log frequencies of `ids`, one added to each count."""
    counts = np.ones(model.vocab_size)
    for start in range(0, len(ids), 1 << 22):  # bincount takes a copy in int64
        counts += np.bincount(ids[start : start + (1 << 22)], minlength=model.vocab_size)
    frequencies = torch.from_numpy(counts).float()
    model.output_bias.copy_((frequencies / frequencies.sum()).log())


def start_from(model: LanguageModel, run_dir: Path, tokenizer: Tokenizer) -> None:
    """Load the best weights of another run, of the same shapes and vocabulary.

    Raises:
        UserError: they are not.
    """
    if saved_tokenizer(run_dir).vocabulary != tokenizer.vocabulary:
        raise UserError(f"trainer.init_from={run_dir}: that run has another vocabulary")
    checkpoint.load_weights(model, run_dir)
    log.info("starting from the best weights of %s", run_dir)


def check_device(name: str) -> str:
    """The device's name, if it can be had.

    Raises:
        UserError: an unknown device, or one that this machine lacks.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"trainer.device={name} cannot be used here ({reason}); trainer.device=cpu can"
        ) from error
    return str(device)


def load_model(run_dir: str | Path, device: str = "cpu") -> LanguageModel:
    """The model of a run with its best weights by validation perplexity.

    Reads config.yaml, tokenizer.json and checkpoints/best; executes no code from them.

    Args:
        run_dir: the folder of a run.
        device: where the parameters go.

    Raises:
        UserError: a folder that holds no finished validation, or a damaged file.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir)
    model = build_model(config.model, len(saved_tokenizer(run_dir)), device)
    checkpoint.load_weights(model, run_dir)
    return model
