"""Subwords: reversible, deterministic, from the training text alone, counted in original words."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mogrifier_lm.data import (
    SPLITS,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_corpus,
    load_tokenizer,
)
from mogrifier_lm.data.source import find_parts
from mogrifier_lm.data.text import Form
from mogrifier_lm.data.tokenizer import CharTokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.options import DataConfig, TokenizerConfig

REAL = os.environ.get("MOGRIFIER_LM_DATA")
TEXT = ["the walker walked and the talker talked", "<unk> walking and talking", "", "a <unk> b"]
HARD = [
    "", "<unk>", "<unk> <unk>", "the  walker\ttalked ", "日本語 ñandú e\u0301 \U0001f600", "a▁b ▁",
    "x<unk>y <unk", "<0x41> <never> \\n", "\x00\x7f a\u200bb \ufffd ⁇", "z" * 5000, "é",
]  # fmt: skip


def text_of(lines: list[str]) -> list[bytes]:
    return ["".join(f"{line}\n" for line in lines).encode()]


def train(model_type: str = "unigram", lines: list[str] = TEXT) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(text_of(lines), model_type=model_type, vocab_size=278)


def assert_reversible(tokenizer: Tokenizer, lines: list[str]) -> None:
    ids = tokenizer.encode(lines)
    normal = [" ".join(line.split()) for line in lines]
    assert tokenizer.decode(ids).split("\n") == [*normal, ""]
    words = [word for line in lines for word in [*line.split(), "<eos>"]]
    assert tokenizer.decode_words(ids) == words
    assert tokenizer.starts[ids].sum() == len(words)


@pytest.mark.parametrize("kind", [WordTokenizer, CharTokenizer, SentencePieceTokenizer])
def test_a_flipped_bit_in_a_word_is_noticed(kind: type[Tokenizer], tmp_path: Path) -> None:
    """One that leaves a tokenizer, of another text: without a checksum its scores are wrong."""
    path, form = tmp_path / "tokenizer.json", Form("nfc")
    settings = {"vocab_size": 278} if kind is SentencePieceTokenizer else {}
    kind.train(text_of(TEXT), form=form, **settings).save(path)  # type: ignore[attr-defined]
    assert load_tokenizer(path).form == form
    file = path.with_suffix(".model") if settings else path
    raw = bytearray(file.read_bytes())
    at = raw.index(b"k") if kind is WordTokenizer else raw.index(b"w")
    raw[at] ^= 4
    file.write_bytes(raw)
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(path)
    raw[at] ^= 4
    file.write_bytes(raw)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "crc32"}))
    assert load_tokenizer(path).encode(TEXT).size, "an older version wrote none"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_every_line_can_be_had_back(model_type: str) -> None:
    tokenizer = train(model_type)
    assert_reversible(tokenizer, TEXT + HARD)
    for line in HARD:
        assert_reversible(tokenizer, [line])


@pytest.mark.skipif(not REAL, reason="MOGRIFIER_LM_DATA is not set")
@pytest.mark.parametrize(
    "folder", ["ptb", pytest.param("wikitext-2", marks=pytest.mark.slow, id="wikitext-2")]
)
def test_every_line_of_real_text_can_be_had_back(folder: str) -> None:
    parts = find_parts(Path(str(REAL), folder), DataConfig(), exact=False)
    lines = {s: part.path.read_text("utf-8").split("\n")[:-1] for s, part in parts.items()}
    tokenizer = SentencePieceTokenizer.train(text_of(lines["train"]))
    assert len(tokenizer) == 5000
    for split in SPLITS:
        assert_reversible(tokenizer, lines[split])


def test_unk_and_eos_are_one_token_and_unk_is_never_a_part() -> None:
    tokenizer = train()
    unk, eos = tokenizer.index["<unk>"], tokenizer.eos_id
    assert tokenizer.encode(["<unk> <unk>", ""]).tolist() == [unk, unk, eos, eos]
    assert unk not in tokenizer.encode(["x<unk>y"])


def test_the_model_is_deterministic_and_of_the_training_text_alone(tmp_path: Path) -> None:
    tokenizer = train()
    assert train().model == tokenizer.model
    assert (
        SentencePieceTokenizer.train(text_of(TEXT), [b"others\n"], vocab_size=278).model
        == tokenizer.model
    )
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.vocabulary == tokenizer.vocabulary
    assert np.array_equal(again.encode(TEXT + HARD), tokenizer.encode(TEXT + HARD))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer.model is missing"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_long_lines_are_learned_from() -> None:
    """SentencePiece leaves lines of more than 4 kB out unless it is told not to."""
    long = " ".join(["walker"] * 1000)
    tokenizer = SentencePieceTokenizer.train(
        text_of([long, "b c"]), model_type="bpe", vocab_size=274
    )
    assert "▁walker" in tokenizer.vocabulary  # 259, the nine characters, six merges


def test_a_vocabulary_that_cannot_be_filled_is_named() -> None:
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=5000: too many, .* \d+ pieces at"):
        SentencePieceTokenizer.train(text_of(TEXT))
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    message = r"tokenizer.vocab_size=260: too few, the characters .* are \d+$"
    with pytest.raises(UserError, match=message):
        SentencePieceTokenizer.train(text_of([characters] * 9), vocab_size=260)


def test_the_corpus_counts_original_words_and_caches_by_settings(
    text_dir: Path, tmp_path: Path
) -> None:
    source = DataConfig(name="text", dir=str(text_dir), cache_dir=str(tmp_path))
    word = load_corpus(source)
    sizes = []
    for vocab_size in (300, 340):
        corpus = load_corpus(source, TokenizerConfig(name="sentencepiece", vocab_size=vocab_size))
        assert len(corpus.tokenizer) == vocab_size
        for split, text in corpus.splits.items():
            ours, theirs = text, word.splits[split]
            assert (ours.words, ours.bytes) == (theirs.words, theirs.bytes)
            assert corpus.tokenizer.decode(ours.ids) == (text_dir / f"{split}.txt").read_text()
        sizes.append(len(corpus.splits["train"].ids))
    assert sizes[0] > sizes[1] > word.splits["train"].words
