"""Scoring the checkpoints of runs; the entry point is scripts/evaluate.py."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mogrifier_lm.config import Config
from mogrifier_lm.data import Corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.score import perplexity
from mogrifier_lm.evaluators.task import Result, Task, check_causality, evaluate
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.runs.build import check_device, saved_corpus, saved_model, use_threads
from mogrifier_lm.runs.folder import RunFolder

SCORED = ("valid", "test")  # splits


def score(
    config: Config,
    model: LanguageModel,
    corpus: Corpus,
    splits: Sequence[str],
    folder: RunFolder | None = None,
) -> Iterator[tuple[str, dict[str, Result]]]:
    """Tune on validation, then score, with one after the other of the config's evaluators.

    Args:
        config: its evaluators and the dropout that the model was trained with.
        model: with trained weights.
        corpus: its text.
        splits: those to score.
        folder: of the run, where the searches are kept.

    Yields:
        An evaluator's name, and split → result.
    """
    eos_id, chosen = corpus.tokenizer.eos_id, config.evaluators.chosen()
    task = Task(
        model=model,
        splits=corpus.splits,
        eos_id=eos_id,
        regularization=config.regularization,
        needed=[needed for evaluator in chosen.values() for needed in evaluator.needs],
    )
    check_causality(model, corpus.splits["valid"], eos_id)
    for name, evaluator in chosen.items():
        results, trials = evaluate(name, evaluator, task, splits)
        if folder:
            tuning = {k: v for k, v in read_json(folder.tuning).items() if k != name}
            tuning |= {name: trials} if trials else {}
            if tuning or folder.tuning.is_file():
                write_json(folder.tuning, tuning)
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
            found[split]["floor_ppl"] = perplexity(text.floor_nats / text.words)
    return found


def load(config: Config, folder: RunFolder) -> LanguageModel:
    """The best weights of a run, on the device and with the threads that the config says."""
    use_threads(config.trainer.threads)
    return saved_model(folder, check_device(config.trainer.device))


def evaluate_run(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Score a run with the evaluators of the config; summary.json takes each's entry as it ends.

    Returns:
        What summary.json holds then.

    Raises:
        UserError: no evaluators, no checkpoint, or text that has changed since.
    """
    if not config.evaluators.chosen():
        raise UserError("no evaluators: give evaluators=[static]")
    with folder.locked():
        summary, corpus = folder.read_summary(), saved_corpus(folder, config)
        for name, results in score(config, load(config, folder), corpus, SCORED, folder):
            for split, figures in entries({name: results}, corpus, SCORED).items():
                summary[split] = {**summary.get(split, {}), **figures}
            write_json(folder.summary, summary)
    return summary
