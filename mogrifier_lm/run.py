"""The composition root: the only place that builds objects out of a config."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mogrifier_lm import checkpoint, provenance
from mogrifier_lm.config import (
    Config,
    DataConfig,
    ModelConfig,
    RegularizationConfig,
    StaticConfig,
    write_json,
)
from mogrifier_lm.data import Corpus, Source, Streams, WordTokenizer, load_corpus
from mogrifier_lm.data.tokenizer import load_tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import EVALUATORS, static
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.optim import build_optimizer
from mogrifier_lm.regularization import Rates
from mogrifier_lm.reports.curves import plot_curves
from mogrifier_lm.reports.table import final_table, objective
from mogrifier_lm.tracking import Tracker, build_tracker
from mogrifier_lm.trainer import Trainer

log = logging.getLogger(__name__)

DEFAULT_THREADS = torch.get_num_threads()  # before a run of a sweep has set another number


def saved_tokenizer(run_dir: Path) -> WordTokenizer:
    path = run_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer.json in {run_dir}: the run ended before its data was read")
    return load_tokenizer(path)


def build_corpus(config: DataConfig, tokenizer: str) -> Corpus:
    fields = {f.name for f in dataclasses.fields(Source)}
    values = {k: v for k, v in vars(config).items() if k in fields and k != "expected"}
    expected = dataclasses.asdict(config.expected) if config.expected else {}
    return load_corpus(Source(**values, expected=expected), tokenizer, config.cache_dir)


def build_model(config: ModelConfig, vocab_size: int, device: str = "cpu") -> LanguageModel:
    """The model of a config, with fresh weights.

    With `num_params` the hidden size is the largest whose model fits the budget.
    """

    def build(hidden_size: int, device: str) -> LanguageModel:
        embedding_size = config.embedding_size or hidden_size
        specs = layer_specs(
            embedding_size,
            hidden_size,
            config.num_layers,
            cell=config.cell,
            rounds=config.rounds,
            rank=config.rank,
            share_rounds=config.share_rounds,
            zigzag=config.zigzag,
            round_bias=config.round_bias,
            cap_input_gate=config.cap_input_gate,
        )
        return LanguageModel(
            vocab_size,
            embedding_size,
            specs,
            tie_embeddings=config.tie_embeddings,
            skip_sum=config.skip_sum,
            backend="auto" if device == "meta" else config.backend,
            device=device,
        )

    try:
        if config.hidden_size is not None:
            return build(config.hidden_size, device)
        assert config.num_params is not None
        low = config.rank or 1
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


def build_rates(config: RegularizationConfig) -> Rates:
    return Rates(
        input=config.input_dropout,
        inter_layer=config.inter_layer_dropout,
        state=config.state_dropout,
        output=config.output_dropout,
        per_step=config.per_step,
    )


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


def score_all(
    config: Config, model: LanguageModel, corpus: Corpus, splits: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """split → evaluator → entry of summary.json, for the evaluators that the config names."""
    results: dict[str, dict[str, Any]] = {split: {} for split in splits}
    for name, evaluator in EVALUATORS.items():
        settings = getattr(config.evaluators, name)
        if settings is None:
            continue
        for split in splits:
            text = corpus.splits[split]
            score = evaluator(model, text, corpus.tokenizer.eos_id, settings)
            results[split][name] = {**score.to_dict(), "batch_size": settings.batch_size}
    for split in splits:
        text = corpus.splits[split]
        if text.floor_nats is not None:
            results[split]["floor_ppl"] = math.exp(text.floor_nats / text.words)
    return results


def run(config: Config, run_dir: Path, overrides: Sequence[str], sweep: str | None) -> float:
    """Train, score, and leave the files of a run.

    Args:
        config: validated.
        run_dir: made by the caller, config.yaml in it; the other files are written there.
        overrides: of the command line, for the tracker's name of the run.
        sweep: the sweep's folder name in a multirun.

    Returns:
        The validation perplexity of the first evaluator, which a sweeper minimises; nan where
        nothing is evaluated.

    Raises:
        UserError: something that the user can mend.
    """
    device = check_device(config.trainer.device)
    torch.set_num_threads(config.trainer.threads or DEFAULT_THREADS)
    corpus = build_corpus(config.data, config.tokenizer.name)
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(corpus.tokenizer), device)
    hidden_size = model.mask_sizes[1][0]
    log.info(
        "%s: %s types; %s rounds %d, %d x %d, %s parameters, kernel %s",
        corpus.name,
        f"{len(corpus.tokenizer):,}",
        config.model.cell,
        config.model.rounds,
        config.model.num_layers,
        hidden_size,
        f"{model.num_params():,}",
        model.backend,
    )
    train = Streams(corpus.splits["train"].ids, config.trainer.batch_size, corpus.tokenizer.eos_id)
    if train.num_steps < config.trainer.bptt:
        raise UserError(
            f"the training text has {train.num_tokens} tokens, {train.num_steps} a stream, which "
            f"is shorter than one window: lower trainer.batch_size or trainer.bptt "
            f"({config.trainer.bptt})"
        )
    valid = corpus.splits["valid"]
    valid_streams = min(config.trainer.valid_batch_size, len(valid.ids))
    resuming = (run_dir / checkpoint.LAST).is_file()
    if not resuming:
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # of a run cut before a checkpoint
    corpus.tokenizer.save(run_dir / "tokenizer.json")
    facts = provenance.collect(
        device=device,
        backend=model.backend,
        data={
            "name": corpus.name,
            "sha256": {name: split.sha256 for name, split in corpus.splits.items()},
            "tokens": {name: len(split.ids) for name, split in corpus.splits.items()},
        },
    )
    write_json(run_dir / "provenance.json", facts)
    values = dataclasses.asdict(config)
    values["model"]["hidden_size"] = hidden_size
    trainer = Trainer(
        model=model,
        train=train,
        optimizer=build_optimizer(config.optimizer, model.parameters()),
        rates=build_rates(config.regularization),
        config=config.trainer,
        validate=lambda: static(
            model,
            valid,
            corpus.tokenizer.eos_id,
            StaticConfig(batch_size=valid_streams, window=64),
        ),
        run_dir=run_dir,
        seed=config.seed,
    )
    if resuming:
        trainer.load()
        log.info("going on after step %d", trainer.progress.step)
    with _tracker(config, run_dir, overrides, sweep, values, trainer.progress.run_id) as tracker:
        trainer.progress.run_id = tracker.run_id
        trainer.fit(tracker.log)
        progress = trainer.progress
        log.info("scoring the best weights")
        scores = score_all(config, model, corpus, ("valid", "test"))
        result = {
            "status": "completed",
            "seed": config.seed,
            "params": model.num_params(),
            "hidden_size": hidden_size,
            "rounds": config.model.rounds,
            "epochs": progress.epoch + progress.position / train.num_steps,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "tokens_per_second": round(
                progress.tokens / (progress.seconds - progress.pause_seconds), 1
            ),
            "best_step": progress.best_step,
            "ended": progress.finished,
            **scores,
        }
        plot_curves(run_dir)
        tracker.summary(result)
        tracker.log_image("curves", run_dir / "curves.png")
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    write_json(run_dir / "summary.json", result)
    log.info("%s", final_table(result, shown))
    return objective(result)


def _tracker(
    config: Config,
    run_dir: Path,
    overrides: Sequence[str],
    sweep: str | None,
    values: dict[str, Any],
    run_id: str | None,
) -> Tracker:
    t = config.tracker
    return build_tracker(
        kind=t.name,
        mode=t.mode,
        project=t.project,
        entity=t.entity,
        run_dir=run_dir,
        config=values,
        group=t.group or sweep,
        name=t.run_name
        or ",".join(o for o in overrides if not o.startswith("tracker"))
        or run_dir.name,
        tags=t.tags,
        run_id=run_id,
    )
