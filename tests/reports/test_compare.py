"""The paired difference of two models, and its interval."""

import math

import numpy as np

from mogrifier_lm.reports.compare import paired_difference, sentence_sums


def test_sentences_end_with_eos() -> None:
    ids = np.array([3, 0, 0, 4, 5, 0])
    assert sentence_sums(np.arange(6.0), ids, 0).tolist() == [1, 2, 12]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Differences of known mean 0.3 nats a word, in 100 samples of 200 sentences."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        words = rng.integers(1, 40, 200)
        base = rng.normal(5, 1, (1, 200)) * words
        difference = words * (0.3 + rng.normal(0, 0.5, 200))
        mean, low, high = paired_difference(base + difference, base, words, resamples=500)
        assert low < mean < high
        covered += low < 0.3 < high
    assert 88 <= covered <= 99
    zero = paired_difference(base, base, words, resamples=10)
    assert zero == (0, 0, 0) and not math.isnan(zero[1])


def test_the_interval_holds_the_spread_over_runs() -> None:
    """Each run is off by the same on every sentence, which sentences alone do not show."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, 40, 300)
    base = rng.normal(5, 1, 300) * words
    runs = base + 0.1 * words * rng.normal(0, 1, (5, 1))
    spread = runs.sum(1).std() / words.sum() / math.sqrt(5)
    mean, low, high = paired_difference(runs, base[None], words, resamples=4000)
    assert math.isclose(mean, (runs.mean(0) - base).sum() / words.sum())
    assert math.isclose(high - low, 2 * 1.96 * spread, rel_tol=0.1)
    _, low, high = paired_difference(runs.mean(0, keepdims=True), base[None], words, resamples=400)
    assert high - low < 1e-9
