"""A run from its config to its summary: train, keep the best weights, score them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mogrifier_lm.config import Config
from mogrifier_lm.data import ORDERS, Corpus, Tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.static import static_score
from mogrifier_lm.files import write_json
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.runs.build import (
    build_corpus,
    build_model,
    check_checkpoint,
    check_device,
    check_training_memory,
    chosen_device,
    saved_corpus,
    start_bias,
    start_from,
    use_threads,
)
from mogrifier_lm.runs.evaluate import SCORED, entries, score
from mogrifier_lm.runs.folder import RunFolder, Status
from mogrifier_lm.training import checkpoint
from mogrifier_lm.training.optim import build_averaging, build_optimizer
from mogrifier_lm.training.parallel import Processes
from mogrifier_lm.training.progress import total_steps
from mogrifier_lm.training.trainer import Track, Trainer

log = logging.getLogger(__name__)


OpenTracker = Callable[[Mapping[str, Any], LanguageModel, Tokenizer], Track]
Describe = Callable[[], Mapping[str, Any]]


def run(
    config: Config,
    folder: RunFolder,
    open_tracker: OpenTracker | None = None,
    describe: Describe = dict,
) -> dict[str, Any]:
    """Train, score, and leave the files of a run; started by torchrun, one of its processes.

    Args:
        config: validated.
        folder: made by the caller, the config in it; the other files are written there.
        open_tracker: called once the model stands, with the config, the size and device that it
            took, the model and its tokenizer; gives what is called with each row of metrics.jsonl.
            Only in the first process.
        describe: what provenance.json says of the process beside its device, kernels and data.

    Returns:
        What summary.json holds; {} in a process beside the first.

    Raises:
        UserError: something that the user can mend.
    """
    processes = Processes()
    if config.trainer.batch_size % (processes.size * config.trainer.accumulation_steps):
        raise UserError(
            f"trainer.batch_size is {config.trainer.batch_size}: {processes.size} processes cannot "
            f"share it equally in {config.trainer.accumulation_steps} trainer.accumulation_steps"
        )
    device = check_device(processes.device(chosen_device(config.trainer.device)))
    use_threads(config.trainer.threads)
    resuming = folder.can_resume()
    corpus = processes.in_turn(
        lambda: saved_corpus(folder, config) if resuming else build_corpus(config)
    )
    vocab_size, tokens = len(corpus.tokenizer), len(corpus.splits["train"].ids)
    check_training_memory(config, vocab_size, tokens, device)
    if resuming:
        path = checkpoint.whole(folder.last, folder.previous)
        check_checkpoint(config.model, vocab_size, path)
    torch.manual_seed(config.seed)
    model = build_model(config.model, vocab_size, device)
    trainer = _trainer(config, folder, corpus, model, processes)
    if config.model.unigram_bias:
        start_bias(model, corpus.splits["train"].ids)
    if config.trainer.init_from and not resuming:
        start_from(model, RunFolder(config.trainer.init_from), corpus.tokenizer)
    if processes.is_first:
        _begin(folder, corpus, model, resuming, processes.size, describe)
    if resuming:
        trainer.load()
        log.info("going on after step %d", trainer.progress.step)
    if not processes.is_first:
        trainer.fit()
        processes.leave()
        return {}
    values = dataclasses.asdict(config)
    values["model"]["hidden_size"] = _hidden_size(model)
    values["trainer"]["device"] = device
    trainer.fit(*([open_tracker(values, model, corpus.tokenizer)] if open_tracker else []))
    processes.leave()
    log.info("scoring the best weights")
    results = dict(score(config, model, corpus, SCORED, folder))
    summary = _summary(config, trainer) | entries(results, corpus, SCORED)
    _keep_scores(folder.read_summary(), summary)
    write_json(folder.summary, summary)
    return summary


def _hidden_size(model: LanguageModel) -> int:
    return int(model.mask_shapes["state.0"][0])


def _trainer(
    config: Config, folder: RunFolder, corpus: Corpus, model: LanguageModel, processes: Processes
) -> Trainer:
    """The trainer of a new model; says what will be trained.

    Raises:
        UserError: the training text is shorter than a window.
    """
    log.info(
        "%s: %s types; %s rounds %d, %d x %d, %s parameters; on %s, kernels %s and %s (output "
        "layer)",
        corpus.name,
        f"{len(corpus.tokenizer):,}",
        config.model.cell,
        config.model.rounds,
        config.model.num_layers,
        _hidden_size(model),
        f"{model.num_params():,}",
        model.output_bias.device,
        model.backend,
        model.output_backend,
    )
    train = ORDERS[config.trainer.streams](
        corpus.splits["train"].ids, config.trainer.batch_size, corpus.tokenizer.eos_id
    )
    if train.num_steps < config.trainer.bptt:
        raise UserError(
            f"the training text has {train.num_tokens} tokens, {train.num_steps} a stream, which "
            f"is shorter than one window: lower trainer.batch_size or trainer.bptt "
            f"({config.trainer.bptt})"
        )
    valid = corpus.splits["valid"]
    valid_streams = min(config.trainer.valid_batch_size, len(valid.ids))
    return Trainer(
        model=model,
        train=train,
        optimizer=build_optimizer(config.optimizer, model.parameters()),
        averaging=build_averaging(
            config.optimizer, model.parameters(), total_steps(train, config.trainer)
        ),
        regularization=config.regularization,
        config=config.trainer,
        validate=lambda: static_score(model, valid, corpus.tokenizer.eos_id, valid_streams),
        files=folder,
        seed=config.seed,
        processes=processes,
    )


def _summary(config: Config, trainer: Trainer) -> dict[str, Any]:
    """What summary.json says of a run beside its scores."""
    progress = trainer.progress
    return {
        "status": Status.COMPLETED,
        "seed": config.seed,
        "params": trainer.model.num_params(),
        "hidden_size": _hidden_size(trainer.model),
        "rounds": config.model.rounds,
        "epochs": progress.epoch + progress.position / trainer.train.num_steps,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / progress.training_seconds, 1),
        "best_step": progress.best_step,
        "ended": progress.finished,
    }


def _keep_scores(earlier: dict[str, Any], summary: dict[str, Any]) -> None:
    """Add to a summary what an earlier one has of the same weights; say what is of other ones."""
    kept = earlier.get("best_step") == summary["best_step"]
    for split in SCORED:
        others = {k: v for k, v in earlier.get(split, {}).items() if k not in summary[split]}
        if kept:
            summary[split] |= others
        elif others:
            log.warning(
                "%s text: what %s gave was of other weights and is gone; scripts/evaluate.py gives "
                "it anew", split, ", ".join(others),
            )  # fmt: skip


def _begin(
    folder: RunFolder,
    corpus: Corpus,
    model: LanguageModel,
    resuming: bool,
    processes: int,
    describe: Describe,
) -> None:
    """Write what a run leaves before it is trained: its tokenizer and where it comes from."""
    if not resuming:
        folder.metrics.unlink(missing_ok=True)  # of a run cut before a checkpoint
        corpus.tokenizer.save(folder.tokenizer)
    device = model.output_bias.device
    facts = {
        **describe(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "backend": model.backend,
        "output_backend": model.output_backend,
        "data": {
            "name": corpus.name,
            "sha256": {name: split.sha256 for name, split in corpus.splits.items()},
            "tokens": {name: len(split.ids) for name, split in corpus.splits.items()},
        },
        "processes": processes,
    }
    if resuming:
        facts["before"] = folder.read_provenance()
    write_json(folder.provenance, facts)
