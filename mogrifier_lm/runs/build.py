"""Builders: the only place that makes objects out of a config, or out of a run's folder."""

import dataclasses
import logging
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mogrifier_lm.cells import CellSpec
from mogrifier_lm.config import Config, load_config
from mogrifier_lm.data import Corpus, Tokenizer, load_corpus, load_tokenizer
from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.machine import lent_cores
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.runs.folder import RunFolder
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


def saved_tokenizer_path(folder: RunFolder) -> Path:
    """The tokenizer of a run.

    Raises:
        UserError: there is none.
    """
    path = folder.tokenizer
    if not path.is_file():
        raise UserError(f"no {path.name} in {folder}: the run ended before its data was read")
    return path


def saved_tokenizer(folder: RunFolder) -> Tokenizer:
    return load_tokenizer(saved_tokenizer_path(folder))


def build_corpus(config: Config) -> Corpus:
    """The corpus of a config; the vocabulary of a run is that run's tokenizer."""
    tokenizer = config.tokenizer
    if tokenizer.vocabulary and Path(tokenizer.vocabulary).is_dir():
        path = saved_tokenizer_path(RunFolder(tokenizer.vocabulary))
        tokenizer = dataclasses.replace(tokenizer, vocabulary=str(path))
    return load_corpus(config.data, tokenizer)


def saved_corpus(folder: RunFolder, config: Config | None = None) -> Corpus:
    """The corpus that a run was trained on; `config` is the run's, default as it was saved.

    Raises:
        UserError: what is found now is another text, or is cut into other tokens.
    """
    config = config or load_config(folder.config)
    corpus = build_corpus(config)
    known = folder.read_provenance(required=True)["data"]["sha256"]
    for name, split in corpus.splits.items():
        if split.sha256 != known[name]:
            raise UserError(
                f"{folder}: the {name} text is not the one of the run: give its data.dir"
            )
    if corpus.tokenizer.vocabulary != saved_tokenizer(folder).vocabulary:
        raise UserError(f"{folder} was made with another version of sentencepiece: other tokens")
    return corpus


def _of_model(error: ValueError) -> UserError:
    """An error of the model's parts, under the key of the config where it begins with one."""
    text = str(error)
    is_key = text.partition(" ")[0] in ModelConfig.__dataclass_fields__
    return UserError(f"model.{text}" if is_key else f"model: {text}")


def build_model(config: ModelConfig, vocab_size: int, device: str = "cpu") -> LanguageModel:
    """The model of a config, with fresh weights.

    With `num_params` the hidden size is the largest whose model fits the budget.

    Raises:
        UserError: sizes that do not fit on each other, or on the device.
    """
    check_memory(model_size(config, vocab_size).bytes(), "the model", device)
    try:
        return _build(_solved(config, vocab_size), vocab_size, device)
    except ValueError as error:
        raise _of_model(error) from error


def _build(config: ModelConfig, vocab_size: int, device: str) -> LanguageModel:
    hidden_size = config.hidden_size
    assert hidden_size is not None
    embedding_size = config.embedding_size or max(1, round(config.embedding_ratio * hidden_size))
    top_size = config.top_hidden_size or hidden_size
    sizes = [embedding_size, *[hidden_size] * (config.num_layers - 1), top_size]
    options = {f.name: vars(config).get(f.name, f.default) for f in fields(CellSpec)}
    del options["input_size"], options["hidden_size"]
    return LanguageModel(
        vocab_size,
        embedding_size,
        layer_specs(sizes, **options),
        tie_embeddings=config.tie_embeddings,
        skip_sum=config.skip_sum,
        residual=config.residual,
        mixture=config.mixture,
        adaptive_softmax=config.adaptive_softmax,
        backend="auto" if device == "meta" else config.backend,
        device=device,
    )


class Size(NamedTuple):
    """Of a model: its numbers, and the tensors that they are in."""

    params: int
    tensors: int

    def bytes(self, copies: int = 1) -> int:
        """Memory of so many copies; a tensor takes some beside its numbers."""
        return 4 * copies * self.params + 4096 * self.tensors


def model_size(config: ModelConfig, vocab_size: int) -> Size:
    """The size of the model that `build_model` makes, without making it.

    Raises:
        UserError: sizes that do not fit on each other, or on any device.
    """
    try:
        return _size(_solved(config, vocab_size), vocab_size)
    except ValueError as error:
        raise _of_model(error) from error
    except RuntimeError as error:  # of shapes whose product is no 64-bit number
        raise UserError(f"the model is larger than any memory: {one_line(error)}") from error


def _size(config: ModelConfig, vocab_size: int) -> Size:
    """From models without memory. Of what there can be without end, a few are built and the rest
    is reckoned: each further layer, pair of rounds or softmax adds the same."""
    for key, period in (("num_layers", 1), ("rounds", 2), ("mixture", 1)):
        count = getattr(config, key)
        if count > 12:
            further = (count - 8) // period
            count -= further * period
            low, high = (
                _size(replace(config, **{key: n}), vocab_size) for n in (count, count + period)
            )
            return Size(*(a + further * (b - a) for a, b in zip(low, high, strict=True)))
    parameters = list(_build(config, vocab_size, "meta").parameters())
    return Size(sum(p.numel() for p in parameters), len(parameters))


def _solved(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """With the largest hidden size that `num_params` allows, where that is given."""
    budget = config.num_params
    if budget is None:
        return config

    def fits(hidden_size: int) -> bool:
        return _size(replace(config, hidden_size=hidden_size), vocab_size).params <= budget

    low = math.ceil((config.rank or 1) / min(1, config.embedding_ratio))
    high = 2 * low
    while fits(high):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not fits(low):
        raise ValueError(f"num_params is {budget:g}, too few for a vocabulary of {vocab_size}")
    return replace(config, hidden_size=low)


def check_training_memory(config: Config, vocab_size: int, tokens: int, device: str) -> None:
    """Refuse a training that cannot fit: what it takes at the least is beyond the device.

    Args:
        config: of the run.
        vocab_size: of its tokenizer.
        tokens: of the training text.
        device: its name.

    Raises:
        UserError: with the memory that it would take.
    """
    size, model = model_size(config.model, vocab_size), _solved(config.model, vocab_size)
    optimizer, trainer = config.optimizer, config.trainer
    # The weights and their gradients, the optimizer's means of these, the average.
    copies = 2 + 2 * (optimizer.name != "sgd") + (optimizer.averaging != "none")
    # For the backward pass each layer keeps its gates and its output, the softmaxes their rows.
    streams = min(trainer.batch_size, tokens) // trainer.accumulation_steps
    rows = min(trainer.bptt, tokens) * streams
    kept = 5 * (model.hidden_size or 0) * (model.num_layers - 1) + model.mixture
    activations = 4 * rows * config.regularization.samples * kept
    check_memory(size.bytes(copies) + activations, "training", device)


def check_memory(size: int, what: str, device: str) -> None:
    """Raises `UserError` where `what` takes more bytes than the device has."""
    if size > (have := _memory(device)):
        raise UserError(
            f"{what} would take at least {size / 1e9:,.1f} GB, and {device} has {have / 1e9:,.1f} "
            "GB: lower the sizes of the model, trainer.batch_size or trainer.bptt"
        )


def _memory(device: str) -> int:
    """Bytes that a process may have there: the machine's, or what a queue or container lends."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        folder = Path("/sys/fs/cgroup", line.rpartition(":")[2].lstrip("/"))
        for file in (parent / "memory.max" for parent in (folder, *folder.parents)):
            if file.is_file() and (text := file.read_text(encoding="utf-8").strip()).isdigit():
                limits.append(int(text))
    return min(limits)


@torch.no_grad()
def start_bias(model: LanguageModel, ids: np.ndarray) -> None:
    """Set the output bias to the log frequencies of `ids`, one added to each count."""
    counts = np.ones(model.vocab_size)
    for start in range(0, len(ids), 1 << 22):  # bincount takes a copy in int64
        counts += np.bincount(ids[start : start + (1 << 22)], minlength=model.vocab_size)
    frequencies = torch.from_numpy(counts).float()
    log_frequencies = (frequencies / frequencies.sum()).log()
    model.output_bias.copy_(log_frequencies)
    if model.tails is not None:
        model.tails.start_bias(log_frequencies)


def start_from(model: LanguageModel, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Load the best weights of another run, of the same shapes and vocabulary.

    Raises:
        UserError: they are not.
    """
    if saved_tokenizer(folder).vocabulary != tokenizer.vocabulary:
        raise UserError(f"trainer.init_from={folder}: that run has another vocabulary")
    checkpoint.load_weights(model, folder.best)
    log.info("starting from the best weights of %s", folder)


def chosen_device(name: str) -> str:
    """What "auto" stands for: a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_device(name: str, key: str = "trainer.device") -> str:
    """The device's name, if it can be had; "auto" is a GPU where there is one.

    Args:
        name: as torch.device takes it, or "auto".
        key: what errors call it.

    Raises:
        UserError: an unknown device, or one that this machine lacks.
    """
    name = chosen_device(name)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta holds no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}={name} cannot be used here ({reason}); {key}=cpu can") from error
    return str(device)


def saved_model(folder: RunFolder, device: str = "cpu") -> LanguageModel:
    """The model of a run with its best weights by validation perplexity.

    Reads config.yaml, tokenizer.json and checkpoints/best; executes no code from them.

    Args:
        folder: of the run.
        device: where the parameters go.

    Raises:
        UserError: a folder that holds no finished validation, or a damaged file.
    """
    config, vocab_size = load_config(folder.config), len(saved_tokenizer(folder))
    check_checkpoint(config.model, vocab_size, folder.best)
    model = build_model(config.model, vocab_size, device)
    checkpoint.load_weights(model, folder.best)
    return model


def check_checkpoint(config: ModelConfig, vocab_size: int, path: Path) -> None:
    """Compare a model with a checkpoint before memory is taken for either.

    Raises:
        UserError: the checkpoint is of another one.
    """
    size, shapes = model_size(config, vocab_size), checkpoint.weight_shapes(path)
    if size != (saved := Size(sum(map(math.prod, shapes)), len(shapes))):
        raise UserError(
            f"{path} does not fit the config and the tokenizer: it has {saved.params:,} weights "
            f"in {saved.tensors} tensors, they ask for {size.params:,} in {size.tensors:,}"
        )
