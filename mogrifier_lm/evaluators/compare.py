"""Is A better than B? The paired difference of two models on the same sentences."""

import numpy as np


def sentence_sums(values_N: np.ndarray, ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Sums [S] over each sentence, its <eos> included, of a value for each token."""
    ends = np.flatnonzero(ids == eos_id)
    return np.add.reduceat(values_N, np.concatenate([[0], ends[:-1] + 1]))[: len(ends)]


def paired_difference(
    nats_a_S: np.ndarray,
    nats_b_S: np.ndarray,
    words_S: np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A - B in nats per word, and its 95 % percentile interval over resampled sentences.

    It says how far the difference would hold on other text of this kind; the spread over seeds is
    another matter.

    Args:
        nats_a_S: of each sentence under A; `nats_b_S` under B.
        words_S: of each sentence, <eos> counted.
        resamples: draws of S sentences with replacement.
        seed: of the draws.
    """
    difference_S = nats_a_S - nats_b_S
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(words_S), size=len(words_S))
        means[i] = difference_S[drawn].sum() / words_S[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference_S.sum() / words_S.sum()), float(low), float(high)
