"""Scoring and comparing the checkpoints of runs; the entry point is scripts/evaluate.py."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mogrifier_lm.checkpoint import load_model
from mogrifier_lm.data import Corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import Result
from mogrifier_lm.evaluators.compare import paired_difference, sentence_sums
from mogrifier_lm.files import locked, write_json
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import Config
from mogrifier_lm.reports.table import score_table
from mogrifier_lm.run import check_device, saved_corpus, score_all

log = logging.getLogger(__name__)

SPLITS = ("valid", "test")


def load_run(config: Config, run_dir: Path) -> tuple[LanguageModel, Corpus]:
    """The best weights of a run and the text that it was trained on.

    Raises:
        UserError: no checkpoint, or text that has changed since.
    """
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    model = load_model(run_dir, check_device(config.trainer.device))
    return model, saved_corpus(run_dir, config)


def evaluate_run(config: Config, run_dir: Path) -> None:
    """Score a run with the evaluators of the config; summary.json takes the new entries in."""
    model, corpus = load_run(config, run_dir)
    with locked(run_dir):
        scores, _ = score_all(config, model, corpus, SPLITS, run_dir)
        path = run_dir / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else {}
        for split, entries in scores.items():
            summary[split] = {**summary.get(split, {}), **entries}
        write_json(path, summary)
    log.info("\n%s", score_table(summary))


def compare_runs(sides: Sequence[Sequence[tuple[Config, Path]]]) -> None:
    """Print the paired difference of two sides, each one run or the same run with several seeds.

    Raises:
        UserError: runs on different text, or nothing to compare.
    """
    corpora: list[Corpus] = []
    results: list[list[dict[str, dict[str, Result]]]] = []
    for name, side in zip("AB", sides, strict=True):
        results.append([])
        for config, run_dir in side:
            log.info("%s: %s", name, run_dir)
            model, corpus = load_run(config, run_dir)
            corpora.append(corpus)
            results[-1].append(score_all(config, model, corpus, SPLITS)[1])
    texts = [[corpus.splits[split].sha256 for split in SPLITS] for corpus in corpora]
    if any(text != texts[0] for text in texts):
        raise UserError("compare: the runs have different validation or test text")
    evaluators = [name for name in results[0][0] if all(name in r for s in results for r in s)]
    if not evaluators:
        raise UserError("compare: the runs share no evaluator: give evaluators=[static]")
    for evaluator in evaluators:
        for split in SPLITS:
            log.info("%s, %s", evaluator, split)
            _compare(evaluator, split, results, corpora)


def _compare(
    evaluator: str,
    split: str,
    results: Sequence[Sequence[dict[str, dict[str, Result]]]],
    corpora: Sequence[Corpus],
) -> None:
    remaining = iter(corpora)
    ids = corpora[0].splits[split].ids
    lines = corpora[0].tokenizer.decode(ids).split("\n")[:-1]
    words_S = np.array([len(line.split()) + 1 for line in lines])
    nats_S, shown = [], []
    for name, side in zip("AB", results, strict=True):
        sums, ppls = [], []
        for run in side:
            corpus, result = next(remaining), run[evaluator][split]
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
