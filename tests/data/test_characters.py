"""Characters and bytes: each is a token; their conventions are those of published figures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mogrifier_lm.data import Corpus, Tokenizer, load_corpus, load_tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.launch.job import run_in
from mogrifier_lm.options import DataConfig, TokenizerConfig
from mogrifier_lm.reports.table import score_table
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import compose_config


def load(tmp_path: Path, texts: dict[str, bytes], tokenizer: str, **options: object) -> Corpus:
    for name, raw in texts.items():
        (tmp_path / name).write_bytes(raw)
    options = {"dir": str(tmp_path), "cache_dir": str(tmp_path / "c"), **options}
    source = DataConfig(name="text", **options)  # type: ignore[arg-type]
    return load_corpus(source, TokenizerConfig(name=tokenizer))


def three(raw: bytes) -> dict[str, bytes]:
    return {f"{split}.txt": raw for split in ("train", "valid", "test")}


def read_back(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    tokenizer.save(path / "tokenizer.json")
    return load_tokenizer(path / "tokenizer.json")


def test_characters_are_as_the_file_has_them(tmp_path: Path) -> None:
    text = " Ça  va,\tné?\n\n x \n"
    corpus = load(tmp_path, three(text.encode()), "char")
    for tokenizer in (corpus.tokenizer, read_back(corpus.tokenizer, tmp_path)):
        assert tokenizer.decode(corpus.splits["test"].ids) == text
        assert np.array_equal(tokenizer.encode(text.split("\n")[:-1]), corpus.splits["test"].ids)
    train = corpus.splits["train"]
    assert (len(train.ids), train.characters, train.bytes) == (18, 18, 20)
    assert train.words == 7
    assert corpus.tokenizer.vocabulary[0] == " " and len(corpus.tokenizer) == len(set(text))


def test_a_character_that_the_training_text_lacks_is_unknown(tmp_path: Path) -> None:
    texts = {"train.txt": b"ab ab\n", "valid.txt": "aéb\n".encode(), "test.txt": b"b\n"}
    corpus = load(tmp_path, texts, "char")
    assert corpus.tokenizer.vocabulary == ["a", "b", " ", "<eos>", "<unk>"]
    assert corpus.splits["valid"].unknown == 1
    with pytest.raises(UserError, match="'z' is not in the vocabulary"):
        load(tmp_path, three(b"ab\n"), "char").tokenizer.encode(["z"])


def test_ptb_char_is_the_text_spelled_out_with_one_end_a_line(tmp_path: Path) -> None:
    spelled, plain = b"t h e _ < u n k > _ N \na _ b \n ", b"the <unk> N\na b\n"
    texts = {f"ptb.char.{s}.txt": spelled for s in ("train", "valid", "test")}
    (tmp_path / "s").mkdir()
    # The same release holds the text in words under the other name, which is not taken here.
    words = {f"ptb.{s}.txt": b"other words\n" for s in ("train", "valid", "test")}
    found = load(tmp_path / "s", texts | words, "char", spelled=True)
    (tmp_path / "p").mkdir()
    expected = load(tmp_path / "p", three(plain), "char")
    assert found.tokenizer.decode(found.splits["test"].ids) == plain.decode()
    assert np.array_equal(found.splits["train"].ids, expected.splits["train"].ids)
    (tmp_path / "w").mkdir()
    with pytest.raises(UserError, match="is not spelled out: it holds the word 'the'"):
        load(tmp_path / "w", three(plain), "char", spelled=True)


def test_text8_is_one_line_without_an_end(tmp_path: Path) -> None:
    text = (b" anarchism originated as a term" * 70)[:2000]
    (tmp_path / "text8").write_bytes(text)
    corpus = load(tmp_path, {}, "char", dir=str(tmp_path / "text8"))
    assert [len(s.ids) for s in corpus.splits.values()] == [1800, 100, 100]
    eos = corpus.tokenizer.eos_id
    assert not any((split.ids == eos).any() for split in corpus.splits.values())
    assert "".join(map(corpus.tokenizer.decode, (s.ids for s in corpus.splits.values()))) == (
        text.decode()
    )


def test_enwik8_is_bytes_cut_to_the_byte(tmp_path: Path) -> None:
    text = ("<page>é\r\n\t\u3000日本\n" * 100).encode()[:2000]
    (tmp_path / "enwik8").write_bytes(text)
    corpus = load(tmp_path, {}, "byte", dir=str(tmp_path / "enwik8"))
    parts = [split.ids.astype(np.uint8).tobytes() for split in corpus.splits.values()]
    assert parts == [text[:1800], text[1800:1900], text[1900:]]
    train = corpus.splits["train"]
    assert train.bytes == train.characters == 1800
    assert train.words == len(text[:1800].split()) + text[:1800].count(b"\n")
    assert len(read_back(corpus.tokenizer, tmp_path)) == 256


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_run_reports_bits_per_character(
    tokenizer: str, small: list[str], tmp_path: Path, text_dir: Path
) -> None:
    node = compose_config([*small, f"tokenizer={tokenizer}", f"data.cache_dir={tmp_path}"])
    (tmp_path / "run").mkdir()
    run_in(node, RunFolder(tmp_path / "run"), [])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    score = summary["test"]["static"]
    assert score["tokens"] == score["characters"] == len((text_dir / "test.txt").read_bytes())
    bits = score["nats"] / math.log(2) / score["tokens"]
    assert score["bits_per_character"] == pytest.approx(bits) and 0 < bits < 8
    table = score_table(summary)
    assert f"{bits:.4f}" in table and "perplexity" not in table


CHINESE = [chr(0x4E00 + i % 300) for i in range(0, 9000, 7)]


def paragraphs(size: int, count: int) -> bytes:
    """Lines of Chinese, of so many characters, without a space."""
    text = "".join(CHINESE[(i * i) % len(CHINESE)] for i in range(size * count))
    return "".join(f"{text[i * size : (i + 1) * size]}\n" for i in range(count)).encode()


def test_a_text_without_spaces_trains_on_subwords(small: list[str], tmp_path: Path) -> None:
    for split, count in (("train", 12), ("valid", 2), ("test", 2)):
        (tmp_path / f"{split}.txt").write_bytes(paragraphs(2500, count))
    overrides = [*small, f"data.dir={tmp_path}", f"data.cache_dir={tmp_path / 'c'}"]
    overrides += ["tokenizer=sentencepiece", "tokenizer.vocab_size=550", "trainer.max_steps=6"]
    (tmp_path / "run").mkdir()
    run_in(compose_config(overrides), RunFolder(tmp_path / "run"), [])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "completed" and summary["best_step"] > 0
    score = summary["test"]["static"]
    assert score["characters"] == 2 * 2501 and score["words"] == 4
    assert score["bits_per_character"] == pytest.approx(
        score["nats"] / math.log(2) / score["characters"]
    )
    assert score["ppl"] is None, "JSON has no Infinity"
    for file in ("summary.json", "metrics.jsonl"):
        assert "Infinity" not in (tmp_path / "run" / file).read_text()
    table = score_table(summary)
    assert "(words of 1250 characters)" in table and max(map(len, table.split("\n"))) < 100


def test_words_without_spaces_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(tmp_path, three(paragraphs(100, 9)), "word")
    assert "its words have 50 characters on average" in caplog.text
    assert "tokenizer=sentencepiece or tokenizer=char" in caplog.text


def test_training_is_steered_by_what_does_not_overflow() -> None:
    score = Score(nats=2800.0, tokens=1000, words=2, bytes=3000, characters=1200)
    assert score.ppl == math.inf and score.unit_ppl == pytest.approx(math.exp(2.8))
    words = Score(nats=2800.0, tokens=1000, words=600, bytes=3000, characters=1200)
    assert words.unit_ppl == words.ppl
    assert "bits_per_character" in score.to_dict() and "characters" not in words.to_dict()
