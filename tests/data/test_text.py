"""Texts as people have them: every form is read as its plain twin is, and what was done is said."""

import gzip
import logging
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mogrifier_lm.data import Corpus, load_corpus
from mogrifier_lm.data.text import CHUNK, Reader
from mogrifier_lm.errors import UserError
from mogrifier_lm.inference.lines import lines_of, read_lines
from mogrifier_lm.options import DataConfig, TokenizerConfig

PLAIN = {"train": "the cat sat\n\na café here\nthe end\n", "valid": "a cat\n", "test": "the\n"}


def corpus(
    folder: Path,
    texts: dict[str, bytes],
    tokenizer: TokenizerConfig | None = None,
    **options: object,
) -> Corpus:
    """A corpus of these files; `NAME` in place of a split's is a file's name."""
    folder.mkdir(exist_ok=True)
    for name, raw in texts.items():
        (folder / (name if "." in name else f"{name}.txt")).write_bytes(raw)
    options = {"dir": str(folder), "cache_dir": str(folder / "cache"), **options}
    return load_corpus(DataConfig(name="text", **options), tokenizer)  # type: ignore[arg-type]


def plain(folder: Path) -> Corpus:
    return corpus(folder / "plain", {split: text.encode() for split, text in PLAIN.items()})


def same(a: Corpus, b: Corpus) -> bool:
    return a.tokenizer.vocabulary == b.tokenizer.vocabulary and all(
        np.array_equal(a.splits[s].ids, b.splits[s].ids)
        and (a.splits[s].words, a.splits[s].bytes, a.splits[s].characters)
        == (b.splits[s].words, b.splits[s].bytes, b.splits[s].characters)
        for s in a.splits
    )


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "mixed"])
def test_every_end_of_a_line_is_one(
    end: str, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    def ended(text: str) -> bytes:
        ends = ["\n", "\r\n", "\r"] if end == "mixed" else [end]
        lines = text.split("\n")[:-1]
        return "".join(f"{line}{ends[i % len(ends)]}" for i, line in enumerate(lines)).encode()

    found = corpus(tmp_path / "t", {split: ended(text) for split, text in PLAIN.items()})
    assert same(found, plain(tmp_path))
    assert ("carriage return" in said.text) == (end in ("\r", "mixed"))


def test_other_characters_end_no_line(tmp_path: Path) -> None:
    inside = "a\u2028b c\u0085d e\x0cf g\x1ch\n"
    found = corpus(tmp_path, {split: inside.encode() for split in PLAIN})
    names = found.tokenizer.decode_words(found.splits["train"].ids)
    assert names == ["a\u2028b", "c\u0085d", "e", "f", "g\x1ch", "<eos>"]


def test_a_text_is_the_same_however_it_is_cut_into_chunks() -> None:
    text = "é a\r\n\r\nb <eos>\r\n c <eos>\r\nd\u0301 <eos>".encode()

    def read(size: int) -> bytes:
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        return b"".join(Reader(DataConfig(markers="keep"), "character").blocks(chunks, "x"))

    assert {read(size) for size in (1, 2, 3, 7, 100)} == {text.replace(b"\r", b"")}


def test_a_line_longer_than_a_chunk_keeps_its_words_and_its_one_end() -> None:
    words = b"ab " * (CHUNK // 3 + 9)
    for ending in (b"<eos>\n", b"<eos>  \n", b"\n", b""):
        for shift in range(4):
            text = b"x" * shift + b" " + words + ending
            chunks = [text[:CHUNK], text[CHUNK:]]
            found = b"".join(Reader(DataConfig()).blocks(chunks, "x"))
            expected = text.replace(b"<eos>", b"").split()
            assert found.split() == expected and found.count(b"\n") == 1, (ending, shift)


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    texts = {split: b"\xef\xbb\xbf" + text.encode() for split, text in PLAIN.items()}
    assert same(corpus(tmp_path / "t", texts), plain(tmp_path))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", r"train.txt is not UTF-8: byte 0xff at offset 0, line 1; iconv -f UTF-16 -t"),
        ("utf-16-le", r"train.txt is not UTF-8: byte 0x00 at offset 1, line 1; iconv -f UTF-16LE"),
        ("utf-16-be", r"train.txt is not UTF-8: byte 0x00 at offset 0, line 1; iconv -f UTF-16BE"),
        ("utf-32-le", r"train.txt is not UTF-8: byte 0x00 at offset 1, line 1; iconv -f UTF-32LE"),
        ("utf-32-be", r"train.txt is not UTF-8: byte 0x00 at offset 0, line 1; iconv -f UTF-32BE"),
        (
            "latin-1",
            r"train.txt is not UTF-8: byte 0xe9 at offset 18, line 3; iconv -f ENCODING \(WIN",
        ),
    ],
)
def test_another_encoding_is_named(encoding: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        text = PLAIN["train"] if encoding == "latin-1" else "the cat\n"
        corpus(tmp_path, dict.fromkeys(PLAIN, text.encode(encoding)))


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("text", ["naïve café, 12\n", "我们 在 北京 大学\n学习\n", "Привет, мир\n"])
def test_the_command_that_is_named_converts_it(encoding: str, text: str, tmp_path: Path) -> None:
    text *= 20
    with pytest.raises(UserError, match="; iconv -f .* converts it") as told:
        corpus(tmp_path, dict.fromkeys(PLAIN, text.encode(encoding)))
    command = re.search("; (iconv .*) converts", str(told.value))
    assert command
    done = subprocess.run(
        [*command[1].split(), str(tmp_path / "train.txt")], capture_output=True, check=True
    )
    assert done.stdout.decode().removeprefix("\ufeff") == text  # which is left out


def test_a_nul_in_a_text_that_is_utf8_is_told_apart(tmp_path: Path) -> None:
    texts = dict.fromkeys(PLAIN, b"the cat\nand the\0dog slept on the mat, a mat of some length\n")
    with pytest.raises(UserError, match=r"byte 0x00 at offset 15, line 2; tr -d '\\000' takes"):
        corpus(tmp_path, texts)


def test_a_text_too_short_to_be_cut_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a part of .*book.txt is empty"):
        corpus(tmp_path, {"book.txt": b"one two three\n"}, dir=str(tmp_path / "book.txt"))


def test_cells_of_a_table_are_read_as_lines_are(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """Markers, carriage returns and forms; an empty cell is an empty line of its item."""
    tokenizer, table = plain(tmp_path).tokenizer, tmp_path / "items.tsv"
    cells = ["<s> the cat </s> <eos>", " <eos>", "UNK cafe\u0301 <eos>"]
    rows = ["id\tsentence", *(f"{i}\t{cell}" for i, cell in enumerate(cells))]
    table.write_bytes("\r\n".join(rows).encode())
    lines = list(lines_of(str(table), tokenizer, "sentence", "id"))
    assert [(line.item, line.text.split()) for line in lines] == [
        ("0", ["the", "cat"]), ("1", []), ("2", ["<unk>", "cafe\u0301"])
    ]  # fmt: skip
    assert "3 final <eos> are the ends of their lines" in said.text
    table.write_text("sentence\na b <eos>\nc d\n")
    with pytest.raises(UserError, match="1 of 2 lines end in <eos>"):
        list(lines_of(str(table), tokenizer, "sentence"))


HIDDEN = "caf\u200be\u0301 ex\u00adit a\u00a0b o\ufb00er x\u2003y\n"


@pytest.mark.parametrize(
    ("normalize", "words", "changed"),
    [
        ("none", ["caf\u200be\u0301", "ex\u00adit", "a\u00a0b", "o\ufb00er", "x\u2003y"], None),
        ("nfc", ["caf\u200bé", "ex\u00adit", "a\u00a0b", "o\ufb00er", "x\u2003y"], 1),
        ("nfkc", ["caf\u200bé", "ex\u00adit", "a", "b", "offer", "x", "y"], 4),
        ("clean", ["café", "exit", "a", "b", "o\ufb00er", "x", "y"], 4),
    ],
)
def test_forms_of_characters(
    normalize: str,
    words: list[str],
    changed: int | None,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
) -> None:
    texts = {split: HIDDEN.encode() for split in PLAIN}
    found = corpus(tmp_path, texts, normalize=normalize)
    assert found.tokenizer.decode_words(found.splits["test"].ids) == [*words, "<eos>"]
    assert (
        found.tokenizer.encode([HIDDEN.strip("\n")]).tolist() == found.splits["test"].ids.tolist()
    )
    note = f"text, train: data.normalize={normalize} changed {changed} words"
    assert (note in said.text) == (changed is not None)


def test_a_difference_in_form_between_splits_is_warned_of(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    texts = {"train": "un café\n".encode(), "valid": "un cafe\u0301\n".encode(), "test": b"un\n"}
    corpus(tmp_path, texts)
    assert "0.0% of train, 33.3% of valid, 0.0% of test: data.normalize=clean" in said.text
    said.clear()
    found = corpus(tmp_path, texts, normalize="clean")
    assert "of train" not in said.text and found.splits["valid"].unknown == 0


def test_the_markers_of_agreement_sets_are_read_as_they_are(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    marked = {s: t.replace("\n", " <eos>\n").encode() for s, t in PLAIN.items()}
    assert same(corpus(tmp_path / "t", marked), plain(tmp_path))
    assert "text, train: markers: 4 final <eos> are the ends of their lines (data.mark" in said.text
    with pytest.raises(UserError, match="train.txt, line 1 holds the word <eos>"):
        corpus(tmp_path / "t", marked, markers="keep")


def test_an_eos_on_some_lines_only_is_refused(tmp_path: Path) -> None:
    text = b"a <eos>\nb\nc <eos>\n"
    with pytest.raises(UserError, match="train.txt: 2 of 3 lines end in <eos>"):
        corpus(tmp_path, {"train": text, "valid": text, "test": text})


def test_other_markers(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    spellings = ["UNK", "<UNK>", "[UNK]", "@@UNKNOWN@@", "<unknown>"]
    text = f"<s> a {' '.join(spellings)} b UNKs x[UNK] </s>\n".encode()
    found = corpus(tmp_path, dict.fromkeys(PLAIN, text))
    expected = ["a", *["<unk>"] * 5, "b", "UNKs", "x[UNK]", "<eos>"]
    assert found.tokenizer.decode_words(found.splits["train"].ids) == expected
    assert found.splits["train"].unknown == 5
    assert "1 <s> left out, 1 </s> left out, 1 UNK read as <unk>" in said.text
    kept = corpus(tmp_path, dict.fromkeys(PLAIN, text), markers="keep")
    words = kept.tokenizer.decode_words(kept.splits["train"].ids)
    assert words == [*text.decode().split(), "<eos>"]


def test_notes_are_given_again_from_the_cache(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        said.clear()
        corpus(tmp_path, dict.fromkeys(PLAIN, b"<s> a\n"))
        assert said.text.count("1 <s> left out") == 3


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "val.txt", "test.txt"),
        ("train.txt", "dev.txt", "test.txt"),
        ("train.txt.gz", "validation.txt", "test.txt.gz"),
        ("train.tokens", "valid.tokens", "test.tokens"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt.gz"),
    ],
)
def test_names_of_files(names: tuple[str, str, str], tmp_path: Path) -> None:
    texts = dict(zip(names, (text.encode() for text in PLAIN.values()), strict=True))
    packed = {n: gzip.compress(t) if n.endswith("gz") else t for n, t in texts.items()}
    found, expected = corpus(tmp_path / "t", packed), plain(tmp_path)
    assert same(found, expected)
    assert [s.sha256 for s in found.splits.values()] == [s.sha256 for s in expected.splits.values()]


def test_a_second_file_of_a_split_is_named(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    texts = {split: text.encode() for split, text in PLAIN.items()}
    corpus(tmp_path, {**texts, "dev.txt": b"other\n"})
    assert "valid.txt is read, not dev.txt" in said.text


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_one_file_is_cut_by_shares(
    name: str, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    lines = [f"line {i} of it" for i in range(100)]
    raw = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    place = {"dir": str(tmp_path / name), "cache_dir": str(tmp_path / "c")}
    found = load_corpus(DataConfig(name="text", shares=[0.7, 0.2, 0.1], **place))
    assert "is cut into 70% train, 20% valid, 10% test, in this order" in said.text
    texts = [found.tokenizer.decode(split.ids) for split in found.splits.values()]
    sizes = [text.count("\n") for text in texts]
    assert sum(sizes) == 100 and abs(sizes[0] - 70) < 3 and abs(sizes[1] - 20) < 3
    words = [word for line in lines for word in [*line.split(), "<eos>"]]
    unknown = [w for s in found.splits.values() for w in found.tokenizer.decode_words(s.ids)]
    assert [(a, b) for a, b in zip(words, unknown, strict=True) if a != b and b != "<unk>"] == []


def test_a_mistyped_environment_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOGRIFIER_LM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"MOGRIFIER_LM_DATA=.*nowhere: there is no such folder"):
        load_corpus(DataConfig(name="ptb", folder="ptb", cache_dir=str(tmp_path)))


def test_a_text_to_be_scored_is_read_as_a_corpus_is(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    tokenizer = plain(tmp_path).tokenizer
    raw = "<s> the café <eos>\r<eos>\r\nthe\u2028UNK UNK <eos>\n".encode()
    for size in (1, 1000):
        said.clear()
        chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
        lines = list(read_lines(chunks, "t.txt", tokenizer))
        assert [line.split(" ") for line in lines] == [
            ["", "the", "café", ""],
            [""],
            ["the\u2028UNK", "<unk>", ""],
        ]
        assert "t.txt: markers: 3 final <eos> are the ends of their lines, 1 <s> left" in said.text
    # What the model knows as a word stays one.
    knowing = corpus(tmp_path / "k", dict.fromkeys(PLAIN, b"<s> a UNK\n"), markers="keep").tokenizer
    assert list(read_lines([b"<s> a UNK <unknown>"], "t", knowing)) == ["<s> a UNK <unk>"]
    assert list(read_lines([], "t", tokenizer)) == []
