"""Scoring and comparing the checkpoints of runs; the entry point is scripts/evaluate.py."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mogrifier_lm.config import Config
from mogrifier_lm.data import UNK, Corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import Result, Task, check_causality, evaluate, perplexity
from mogrifier_lm.evaluators.compare import paired_difference, sentence_sums
from mogrifier_lm.files import read_json, write_json
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.runs.build import check_device, saved_corpus, saved_model, use_threads
from mogrifier_lm.runs.folder import RunFolder

log = logging.getLogger(__name__)

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


def _load(config: Config, folder: RunFolder) -> LanguageModel:
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
        for name, results in score(config, _load(config, folder), corpus, SCORED, folder):
            for split, figures in entries({name: results}, corpus, SCORED).items():
                summary[split] = {**summary.get(split, {}), **figures}
            write_json(folder.summary, summary)
    return summary


@dataclass
class _Compared:
    """A run of a comparison, and its evaluator → split → result."""

    config: Config
    folder: RunFolder
    corpus: Corpus
    results: dict[str, dict[str, Result]] = field(default_factory=dict)


def compare_runs(sides: Sequence[Sequence[tuple[Config, RunFolder]]]) -> None:
    """Print the paired difference of two sides, each one run or the same run with several seeds.

    Raises:
        UserError: runs on different text, a run twice on a side, or nothing to compare.
    """
    compared = [
        [_Compared(c, folder, saved_corpus(folder, c)) for c, folder in side] for side in sides
    ]
    for side in compared:
        if len({run.folder.path.resolve() for run in side}) < max(1, len(side)):
            raise UserError("compare: a side has no run, or one run twice")
    runs = [run for side in compared for run in side]
    texts = [[run.corpus.splits[split].sha256 for split in SCORED] for run in runs]
    if any(text != texts[0] for text in texts):
        raise UserError("compare: the runs have different validation or test text")
    shared = set.intersection(*(set(run.config.evaluators.chosen()) for run in runs))
    if not shared:
        raise UserError("compare: the runs share no evaluator: give evaluators=[static]")
    _warn_of_unknown(compared)
    for name, side in zip("AB", compared, strict=True):
        for run in side:
            log.info("%s: %s", name, run.folder)
            for other in set(vars(run.config.evaluators)) - shared:
                setattr(run.config.evaluators, other, None)
            run.results = dict(score(run.config, _load(run.config, run.folder), run.corpus, SCORED))
    for evaluator in runs[0].results:
        for split in SCORED:
            log.info("%s, %s", evaluator, split)
            _compare(evaluator, split, compared)


def _warn_of_unknown(sides: Sequence[Sequence[_Compared]]) -> None:
    """To predict <unk> is easier than the word behind it, so as many words have to be unknown."""
    for split in SCORED:
        shares = []
        for side in sides:
            corpus = side[0].corpus
            words = corpus.tokenizer.decode_words(corpus.splits[split].ids)
            shares.append(100 * words.count(UNK) / len(words))
        if shares[0] != shares[1]:
            log.warning(
                "%s: %.2f %% of the words are <unk> to A, %.2f %% to B: their perplexities do not "
                "compare", split, *shares,
            )  # fmt: skip


def _compare(evaluator: str, split: str, sides: Sequence[Sequence[_Compared]]) -> None:
    corpus = sides[0][0].corpus
    lines = corpus.tokenizer.decode(corpus.splits[split].ids).split("\n")[:-1]
    words_S = np.array([len(line.split()) + 1 for line in lines])
    nats_S, shown = [], []
    for name, side in zip("AB", sides, strict=True):
        sums, ppls = [], []
        for run in side:
            corpus, result = run.corpus, run.results[evaluator][split]
            nats = result.evaluation.nats.double().numpy()
            sums.append(sentence_sums(nats, corpus.splits[split].ids, corpus.tokenizer.eos_id))
            ppls.append(result.score.ppl)
        nats_S.append(np.mean(sums, axis=0))
        spread = f" ± {np.std(ppls, ddof=1):.2f} (n = {len(ppls)})" if len(ppls) > 1 else ""
        shown.append(f"{name} {np.mean(ppls):.2f}{spread}")
    mean, low, high = paired_difference(nats_S[0], nats_S[1], words_S)
    log.info(
        "  A − B = %+.4f nats/word [%+.4f, %+.4f], ppl %s "
        "(95 %% interval, 10,000 resamples of %s sentences, seed 0)",
        mean,
        low,
        high,
        ", ".join(shown),
        f"{len(words_S):,}",
    )
