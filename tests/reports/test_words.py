"""Numbers of the report on words, each against a count by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mogrifier_lm.data import SentencePieceTokenizer, WordTokenizer
from mogrifier_lm.inference.counts import training_counts
from mogrifier_lm.reports.words import (
    COUNT_BANDS,
    WordNats,
    bands,
    per_word,
    plot_words,
    word_nats,
    words_table,
)

TRAIN = ["a a b", "", "a c"]


@pytest.fixture
def text() -> WordNats:
    text = "\n".join([*TRAIN, ""]).encode()
    tokenizer = WordTokenizer.train([text], [b"d\n"])
    ids = tokenizer.encode(["b a", "", "d a"])
    counts = training_counts(tokenizer, tokenizer.encode(TRAIN))
    return word_nats(tokenizer, ids, np.array([4.0, 1.0, 0.5, 2.0, 6.0, 1.5, 0.25]), counts)


def test_words_places_and_training_counts(text: WordNats) -> None:
    assert text.words == ["b", "a", "<eos>", "<eos>", "<unk>", "a", "<eos>"]
    assert text.places.tolist() == [1, 2, 3, 1, 1, 2, 3]
    assert text.counts.tolist() == [1, 3, 3, 3, 0, 3, 3]


def test_bands_hold_every_word_once(text: WordNats) -> None:
    found = [(b.label, b.words, b.nats) for b in bands(text.counts, text.nats, COUNT_BANDS)]
    assert found == [("0", 1, 6.0), ("1–9", 6, 9.25)]
    values = np.array([1, 5, 6, 10, 11, 99])
    found = [(b.label, b.words, b.nats) for b in bands(values, np.ones(6), (1, 5, 6, 11))]
    assert found == [("1–4", 1, 1.0), ("5", 1, 1.0), ("6–10", 2, 2.0), ("≥ 11", 2, 2.0)]


def test_the_table_ranks_words_by_mean_and_by_sum(text: WordNats) -> None:
    page = words_table(text, "t", min_count=2)
    assert "7 words, 2.1786 nats a word, perplexity 8.83" in page
    assert page.splitlines()[-2:] == [
        r"| a 1.25 (×2)      | \<eos> 0.92 (×3) | \<eos> 2.75 (×3) | a 2.50 (×2)      |",
        r"| \<eos> 0.92 (×3) | a 1.25 (×2)      | a 2.50 (×2)      | \<eos> 2.75 (×3) |",
    ]
    assert "<unk>" not in page and "<unk> 6.00 (×1)" in words_table(text, "t", min_count=1)


def test_a_words_nats_are_the_sum_of_its_pieces() -> None:
    tokenizer = SentencePieceTokenizer.train([b"abc ab a b c bc\n"] * 9, vocab_size=266)
    ids = tokenizer.encode(["abcabc é", "a"])
    pieces = [len(tokenizer.encode_block(word.encode())) for word in ("abcabc", "é")]
    assert pieces[0] > 1 and pieces[1] == 3
    assert per_word(tokenizer, ids, np.ones(len(ids))).tolist() == [*pieces, 1, 1, 1]


def test_without_matplotlib_the_plot_is_left_out(
    text: WordNats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_words(text, "text", tmp_path / "words.png")
    assert caplog.messages == ["matplotlib is not installed: words.png is left out"]
    assert not list(tmp_path.iterdir())
