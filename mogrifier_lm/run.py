"""The composition root: the only place that builds objects out of a config."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mogrifier_lm import checkpoint, provenance
from mogrifier_lm.config import load_config
from mogrifier_lm.data import ORDERS, Corpus, Tokenizer, load_corpus
from mogrifier_lm.data.tokenizer import load_tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import (
    EVALUATORS,
    Result,
    Task,
    check_causality,
    evaluate,
    static_score,
)
from mogrifier_lm.files import read_json, shown, write_json
from mogrifier_lm.model import LanguageModel, layer_specs
from mogrifier_lm.optim import build_averaging, build_optimizer
from mogrifier_lm.options import Config, ModelConfig
from mogrifier_lm.parallel import Processes
from mogrifier_lm.reports.curves import plot_curves
from mogrifier_lm.reports.sweep import sweep_of
from mogrifier_lm.reports.table import final_table, objective
from mogrifier_lm.tracking import Tracker, build_tracker
from mogrifier_lm.trainer import Trainer, total_steps

log = logging.getLogger(__name__)

SCORED = ("valid", "test")  # splits
# Before a run of a sweep has set another number. A launcher that divides the cores says so by
# OMP_NUM_THREADS; else what SLURM has lent counts, not the node's cores.
DEFAULT_THREADS = (
    torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ
    else int(os.environ.get("SLURM_CPUS_PER_TASK") or torch.get_num_threads())
)


def saved_tokenizer(run_dir: Path) -> Tokenizer:
    path = run_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer.json in {run_dir}: the run ended before its data was read")
    return load_tokenizer(path)


def saved_corpus(run_dir: Path, config: Config | None = None) -> Corpus:
    """The corpus that a run was trained on; `config` is the run's, default as it was saved.

    Raises:
        UserError: what is found now is another text, or is cut into other tokens.
    """
    config = config or load_config(run_dir)
    corpus = load_corpus(config.data, config.tokenizer)
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
        specs = layer_specs(
            [embedding_size, *[hidden_size] * (config.num_layers - 1), top_size],
            cell=config.cell,
            rounds=config.rounds,
            rank=config.rank,
            share_rounds=config.share_rounds,
            zigzag=config.zigzag,
            round_bias=config.round_bias,
            cap_input_gate=config.cap_input_gate,
            init=config.init,
            chrono_t_max=config.chrono_t_max,
        )
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
    counts = torch.from_numpy(np.bincount(ids, minlength=model.vocab_size)) + 1.0
    model.output_bias.copy_((counts / counts.sum()).log())


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


def score(
    config: Config,
    model: LanguageModel,
    corpus: Corpus,
    splits: Sequence[str],
    run_dir: Path | None = None,
) -> Iterator[tuple[str, dict[str, Result]]]:
    """Tune on validation, then score, with one after the other of the config's evaluators.

    Args:
        config: its evaluators and the dropout that the model was trained with.
        model: with trained weights.
        corpus: its text.
        splits: those to score.
        run_dir: where the searches are kept, in tuning.json.

    Yields:
        An evaluator's name, and split → result.
    """
    eos_id = corpus.tokenizer.eos_id
    task = Task(
        model=model,
        splits=corpus.splits,
        eos_id=eos_id,
        regularization=config.regularization,
        keep=["dynamic"] if config.evaluators.dynamic_cache else [],
    )
    check_causality(model, corpus.splits["valid"], eos_id)
    for name, evaluator in EVALUATORS.items():
        settings = getattr(config.evaluators, name)
        if name == "mc_dropout" and settings and settings.window is None:
            settings = dataclasses.replace(settings, window=config.trainer.bptt)
        if settings is None:
            continue
        results, trials = evaluate(name, evaluator, settings, task, splits)
        if run_dir:
            path = run_dir / "tuning.json"
            tuning = {k: v for k, v in read_json(path).items() if k != name}
            tuning |= {name: trials} if trials else {}
            if tuning or path.is_file():
                write_json(path, tuning)
        yield name, results


def entries(
    results: Mapping[str, Mapping[str, Result]], corpus: Corpus, splits: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Split → evaluator → figures, as in summary.json; with the floor where the source is known."""
    found: dict[str, dict[str, Any]] = {}
    for split in splits:
        text = corpus.splits[split]
        found[split] = {name: result[split].to_dict() for name, result in results.items()}
        if text.floor_nats is not None:
            found[split]["floor_ppl"] = math.exp(text.floor_nats / text.words)
    return found


def run(config: Config, run_dir: Path, overrides: Sequence[str]) -> float:
    """Train, score, and leave the files of a run; started by torchrun, one of its processes.

    Args:
        config: validated.
        run_dir: made by the caller, config.yaml in it; the other files are written there.
        overrides: of the command line, for the tracker's name of the run.

    Returns:
        The validation perplexity of the first evaluator, which a sweeper minimises; nan where
        nothing is evaluated.

    Raises:
        UserError: something that the user can mend.
    """
    processes = Processes()
    if config.trainer.batch_size % processes.size:
        raise UserError(
            f"trainer.batch_size is {config.trainer.batch_size}: {processes.size} processes cannot "
            "share it equally"
        )
    device = check_device(processes.device(config.trainer.device))
    torch.set_num_threads(config.trainer.threads or DEFAULT_THREADS)
    resuming = (run_dir / checkpoint.LAST).is_file()
    corpus = processes.in_turn(
        lambda: (
            saved_corpus(run_dir, config)
            if resuming
            else load_corpus(config.data, config.tokenizer)
        )
    )
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(corpus.tokenizer), device)
    hidden_size = model.mask_shapes["state.0"][0]
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
    if config.model.unigram_bias:
        start_bias(model, corpus.splits["train"].ids)
    if config.trainer.init_from and not resuming:
        start_from(model, Path(config.trainer.init_from), corpus.tokenizer)
    if processes.is_first:
        _begin(run_dir, corpus, model, resuming, processes.size)
    values = dataclasses.asdict(config)
    values["model"]["hidden_size"] = hidden_size
    trainer = Trainer(
        model=model,
        train=train,
        optimizer=build_optimizer(config.optimizer, model.parameters()),
        averaging=build_averaging(
            config.optimizer, model.parameters(), total_steps(train, config.trainer)
        ),
        regularization=config.regularization,
        config=config.trainer,
        validate=lambda: static_score(model, valid, corpus.tokenizer.eos_id, valid_streams),
        run_dir=run_dir,
        seed=config.seed,
        processes=processes,
    )
    if resuming:
        trainer.load()
        log.info("going on after step %d", trainer.progress.step)
    if not processes.is_first:
        trainer.fit()
        processes.part()
        return trainer.progress.best_ppl
    with _tracker(config, run_dir, overrides, values, trainer.progress.run_id) as tracker:
        trainer.progress.run_id = tracker.run_id
        trainer.fit(tracker.log)
        processes.part()
        progress = trainer.progress
        log.info("scoring the best weights")
        results = dict(score(config, model, corpus, SCORED, run_dir))
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
            **entries(results, corpus, SCORED),
        }
        plot_curves(run_dir)
        tracker.summary(result)
        tracker.log_image("curves", run_dir / "curves.png")
        if config.tracker.artifacts:
            names = ("config.yaml", "tokenizer.json", "tokenizer.model", checkpoint.BEST)
            files = [Path(name) for name in names if (run_dir / name).is_file()]
            tracker.log_model(run_dir, files, result)
    write_json(run_dir / "summary.json", result)
    log.info("%s", final_table(result, shown(run_dir)))
    return objective(result)


def _begin(
    run_dir: Path, corpus: Corpus, model: LanguageModel, resuming: bool, processes: int
) -> None:
    """Write what a run leaves before it is trained: tokenizer.json and provenance.json."""
    if not resuming:
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # of a run cut before a checkpoint
    corpus.tokenizer.save(run_dir / "tokenizer.json")
    facts = provenance.collect(
        device=str(model.output_bias.device),
        backend=model.backend,
        data={
            "name": corpus.name,
            "sha256": {name: split.sha256 for name, split in corpus.splits.items()},
            "tokens": {name: len(split.ids) for name, split in corpus.splits.items()},
        },
    )
    facts["processes"] = processes
    if resuming:
        facts["before"] = read_json(run_dir / "provenance.json")
    write_json(run_dir / "provenance.json", facts)


def _tracker(
    config: Config,
    run_dir: Path,
    overrides: Sequence[str],
    values: dict[str, Any],
    run_id: str | None,
) -> Tracker:
    t = config.tracker
    if begun := read_json(run_dir / "overrides.json"):  # a run that goes on keeps its name
        overrides = [f"{k}={v}" for k, v in begun.items()]
    chosen = dict(o.split("=", 1) for o in overrides if o.startswith(("experiment=", "sweep=")))
    names = [*chosen.values(), config.data.name, config.model.cell]
    names += ["mogrifier"] if config.model.rounds else []
    return build_tracker(
        kind=t.name,
        mode=t.mode,
        project=t.project,
        entity=t.entity,
        run_dir=run_dir,
        config={**values, "overrides": list(overrides)},
        group=t.group or sweep_of(run_dir),
        name=t.run_name or short_name(overrides) or run_dir.name,
        tags=list(dict.fromkeys([*t.tags, *(name[:64] for name in names)])),
        run_id=run_id,
    )


def short_name(overrides: Sequence[str]) -> str:
    """What tells a run from others: rounds=3,seed=1 of model.rounds=3 and seed=1.

    A key keeps its whole path where its last part alone would be another key's too.
    """
    skipped = ("tracker", "sweep=", "data.dir=", "data.cache_dir=")
    pairs = [o.lstrip("+").split("=", 1) for o in overrides if not o.startswith(skipped)]
    last = [pair[0].rpartition(".")[2] for pair in pairs]
    return ",".join(
        "=".join([key if last.count(short) > 1 else short, *value])
        for short, (key, *value) in zip(last, pairs, strict=True)
    )
