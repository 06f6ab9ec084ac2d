"""A run from its config to its summary: train, keep the best weights, score them."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mogrifier_lm.data import ORDERS, Corpus, load_corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import (
    static_score,
)
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import Config
from mogrifier_lm.reports.folders import sweep_of
from mogrifier_lm.reports.plots import plot_curves
from mogrifier_lm.reports.table import final_table, objective
from mogrifier_lm.runs import provenance
from mogrifier_lm.runs.build import (
    build_model,
    check_device,
    saved_corpus,
    start_bias,
    start_from,
    use_threads,
)
from mogrifier_lm.runs.evaluate import SCORED, entries, score
from mogrifier_lm.terminal import shown
from mogrifier_lm.tracking.tracker import Tracker, build_tracker
from mogrifier_lm.training import checkpoint
from mogrifier_lm.training.optim import build_averaging, build_optimizer
from mogrifier_lm.training.parallel import Processes
from mogrifier_lm.training.trainer import Trainer, total_steps

log = logging.getLogger(__name__)


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
    use_threads(config.trainer.threads)
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
