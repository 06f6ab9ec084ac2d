"""Is A better than B? The paired difference of two models on the same sentences."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mogrifier_lm.config import Config
from mogrifier_lm.data import UNK, Corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.task import Result
from mogrifier_lm.runs.evaluate import SCORED, load, score
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.texts.fetch import fetched_corpus

log = logging.getLogger(__name__)


def sentence_sums(values_N: np.ndarray, ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Add up what tokens have, sentence by sentence.

    Args:
        values_N: a value for each token, such as nats.
        ids: [N] the tokens.
        eos_id: that ends a sentence, and belongs to it.

    Returns:
        [S] sums; what stands behind the last <eos> counts to its sentence.
    """
    ends = np.flatnonzero(ids == eos_id)
    return np.add.reduceat(values_N, np.concatenate([[0], ends[:-1] + 1]))[: len(ends)]


def paired_difference(
    nats_a_KS: np.ndarray,
    nats_b_KS: np.ndarray,
    words_S: np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A - B in nats per word, and its 95 % percentile interval over resampled sentences and runs.

    It says how far the difference would hold on other text of this kind and, where a side has
    several runs, with other seeds. Few runs show too little of the spread over seeds: K of them
    (K - 1) / K of its variance. One shows nothing of it.

    Args:
        nats_a_KS: of each sentence under the K runs of A; `nats_b_KS` under those of B.
        words_S: of each sentence, <eos> counted.
        resamples: draws with replacement, of S sentences and of as many runs as each side has.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(words_S), size=len(words_S))
        sums = []
        for nats_KS in (nats_a_KS, nats_b_KS):
            runs = rng.integers(len(nats_KS), size=len(nats_KS)) if len(nats_KS) > 1 else [0]
            sums.append(nats_KS[:, drawn].sum(1)[runs].mean())
        means[i] = (sums[0] - sums[1]) / words_S[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    total = nats_a_KS.mean(0).sum() - nats_b_KS.mean(0).sum()
    return float(total / words_S.sum()), float(low), float(high)


@dataclass
class _Compared:
    """A run of a comparison, and its evaluator → split → result."""

    config: Config
    folder: RunFolder
    corpus: Corpus
    results: dict[str, dict[str, Result]] = field(default_factory=dict)


def compare_runs(sides: Sequence[Sequence[tuple[Config, RunFolder]]]) -> dict[str, dict[str, Any]]:
    """Print the paired difference of two sides, each one run or the same run with several seeds.

    Returns:
        The same figures: evaluator → split → `difference` and `interval` in nats a word, `ppl` of
        each run of A and of B.

    Raises:
        UserError: runs on different text, a run twice on a side, or nothing to compare.
    """
    compared = [
        [_Compared(c, folder, fetched_corpus(folder, c)) for c, folder in side] for side in sides
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
            run.results = dict(score(run.config, load(run.config, run.folder), run.corpus, SCORED))
    figures: dict[str, dict[str, Any]] = {}
    for evaluator in runs[0].results:
        for split in SCORED:
            log.info("%s, %s", evaluator, split)
            figures.setdefault(evaluator, {})[split] = _compare(evaluator, split, compared)
    return figures


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


def _compare(evaluator: str, split: str, sides: Sequence[Sequence[_Compared]]) -> dict[str, Any]:
    corpus = sides[0][0].corpus
    lines = corpus.tokenizer.decode(corpus.splits[split].ids).split("\n")[:-1]
    words_S = np.array([len(line.split()) + 1 for line in lines])
    nats_KS, ppls, shown = [], [], []
    for name, side in zip("AB", sides, strict=True):
        sums = []
        for run in side:
            corpus, result = run.corpus, run.results[evaluator][split]
            nats = result.evaluation.nats.double().numpy()
            sums.append(sentence_sums(nats, corpus.splits[split].ids, corpus.tokenizer.eos_id))
        nats_KS.append(np.stack(sums))
        ppl = [run.results[evaluator][split].score.ppl for run in side]
        spread = f" ± {np.std(ppl, ddof=1):.2f} (n = {len(ppl)})" if len(ppl) > 1 else ""
        shown.append(f"{name} {np.mean(ppl):.2f}{spread}")
        ppls.append(ppl)
    mean, low, high = paired_difference(nats_KS[0], nats_KS[1], words_S)
    over = f"{len(words_S):,} sentences" + " and of the runs" * (max(map(len, sides)) > 1)
    log.info(
        "  A − B = %+.4f nats/word [%+.4f, %+.4f], ppl %s "
        "(95 %% interval, 10,000 resamples of %s, seed 0)",
        mean, low, high, ", ".join(shown), over,
    )  # fmt: skip
    return {"difference": mean, "interval": [low, high], "ppl": ppls}
