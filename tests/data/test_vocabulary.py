"""Which words are types, and what becomes of the others."""

import logging
from pathlib import Path

import pytest

from mogrifier_lm.data import Corpus, WordTokenizer, load_corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.job import run_in
from mogrifier_lm.options import DataConfig, TokenizerConfig
from mogrifier_lm.runs.build import saved_corpus, saved_tokenizer
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import compose_config

TEXTS = {"train": "b b b b a a a c c d e\nb\n", "valid": "a c new\n", "test": "d a B\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, text in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def load(folder: Path, **options: object) -> Corpus:
    source = DataConfig(name="text", dir=str(folder), cache_dir=str(folder / "cache"))
    return load_corpus(source, TokenizerConfig(**options))  # type: ignore[arg-type]


def words(corpus: Corpus, split: str) -> str:
    return corpus.tokenizer.decode(corpus.splits[split].ids)


@pytest.mark.parametrize(
    ("options", "vocabulary"),
    [
        ({}, ["b", "a", "<eos>", "c", "d", "e", "<unk>"]),
        ({"min_count": 1}, ["b", "a", "<eos>", "c", "d", "e", "<unk>"]),
        ({"min_count": 2}, ["b", "a", "<eos>", "<unk>", "c"]),
        ({"min_count": 3}, ["b", "<unk>", "a", "<eos>"]),
        ({"max_size": 7}, ["b", "a", "<eos>", "c", "d", "e", "<unk>"]),
        ({"max_size": 6}, ["b", "a", "<eos>", "c", "<unk>", "d"]),
        ({"max_size": 4}, ["b", "<unk>", "a", "<eos>"]),
        ({"max_size": 4, "min_count": 5}, ["<unk>", "b", "<eos>"]),
        ({"lowercase": True, "max_size": 3}, ["<unk>", "b", "<eos>"]),
    ],
)
def test_the_tail_is_a_trained_unknown_word(
    options: dict[str, object], vocabulary: list[str], folder: Path
) -> None:
    corpus = load(folder, **options)
    assert corpus.tokenizer.vocabulary == vocabulary
    assert corpus.splits["train"].words == 14
    shown = words(corpus, "train").split()
    assert corpus.splits["train"].unknown == shown.count("<unk>")
    known = set(vocabulary)
    assert shown == [w if w in known else "<unk>" for w in TEXTS["train"].split()]


def test_max_size_counts_an_unknown_word_that_only_the_others_need(tmp_path: Path) -> None:
    for split, text in {"train": "b b a\n", "valid": "new\n", "test": "a\n"}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    assert load(tmp_path, max_size=3).tokenizer.vocabulary == ["b", "<eos>", "<unk>"]
    assert load(tmp_path, max_size=4).tokenizer.vocabulary == ["b", "<eos>", "a", "<unk>"]


def test_lower_case_is_of_the_tokenizer_so_other_text_is_read_so_too(folder: Path) -> None:
    corpus = load(folder, lowercase=True)
    assert words(corpus, "test") == "d a b\n"
    assert corpus.tokenizer.encode(["D A"]).tolist() == corpus.tokenizer.encode(["d a"]).tolist()
    assert "<unk>" in words(load(folder), "test")


def test_a_spelling_of_unknown_words_can_be_given(folder: Path) -> None:
    corpus = load(folder, unk="c")
    assert corpus.splits["train"].unknown == 2 and "c" not in corpus.tokenizer.vocabulary
    assert words(corpus, "valid") == "a <unk> <unk>\n"


def test_the_advice_on_unknown_words_works(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("text: 25.00 % of the validation and 25.00 % of the test tokens are")
    assert "tokenizer.min_count=2" in warning
    caplog.clear()
    corpus = load(folder, min_count=2)
    assert not caplog.records and corpus.splits["train"].unknown == 2


def test_a_vocabulary_is_taken_from_a_file_or_another_run(folder: Path) -> None:
    listed = folder / "types.txt"
    listed.write_text("c\na\n<unk>\nnew\n")
    corpus = load(folder, vocabulary=str(listed))
    assert corpus.tokenizer.vocabulary == ["c", "a", "<unk>", "new", "<eos>"]
    assert words(corpus, "valid") == "a c new\n"
    assert words(corpus, "test") == "<unk> a <unk>\n"
    listed.write_text("c\na\nnew\n")  # another content is another cache entry
    with pytest.raises(
        UserError, match="'b' is not in the vocabulary, nor is <unk>: add <unk> to it"
    ):
        load(folder, vocabulary=str(listed))
    first = load(folder, lowercase=True)
    saved = folder / "tokenizer.json"
    first.tokenizer.save(saved)
    (folder / "train.txt").write_text("New words here\n")
    again = load(folder, vocabulary=str(saved))
    assert again.tokenizer.vocabulary == first.tokenizer.vocabulary
    assert words(again, "test") == "d a b\n"


def test_subwords_of_another_run(folder: Path) -> None:
    texts = {"train": "a walker walked\n" * 30, "valid": "a walk\n", "test": "walk\n"}
    for split, text in texts.items():
        (folder / f"{split}.txt").write_text(text)
    first = load(folder, name="sentencepiece", vocab_size=268)
    first.tokenizer.save(folder / "tokenizer.json")
    (folder / "train.txt").write_text("the talker talked\n" * 9)
    taken = load(folder, name="sentencepiece", vocabulary=str(folder / "tokenizer.json"))
    assert taken.tokenizer.vocabulary == first.tokenizer.vocabulary
    assert words(taken, "train") == "the talker talked\n" * 9
    with pytest.raises(UserError, match="is one of tokenizer=sentencepiece: give it"):
        load(folder, vocabulary=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_vocabulary_that_is_none(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match="tokenizer.vocabulary=.*a word a line"):
        load(folder, vocabulary=str(folder / name))


def test_ids_do_not_depend_on_where_blocks_end() -> None:
    text = b"a b\n\nc a\nb c d\n"
    blocks = [[text], [text[:4], text[4:5], text[5:]], [text[:3], text[3:]]]
    found = [WordTokenizer.train(iter(parts)).vocabulary for parts in blocks]
    assert found == [["<eos>", "a", "b", "c", "d"]] * 3


def test_training_goes_on_from_another_run_on_new_text(small: list[str], tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    text_dir = Path(next(o for o in small if o.startswith("data.dir=")).partition("=")[2])
    for split in ("train", "valid", "test"):
        text = (text_dir / f"{split}.txt").read_text("utf-8")
        (new / f"{split}.txt").write_text(f"brandnew {text}", encoding="utf-8")

    def run(name: str, *overrides: str) -> RunFolder:
        (tmp_path / name).mkdir()
        run_in(compose_config([*small, *overrides]), RunFolder(tmp_path / name), [])
        return RunFolder(tmp_path / name)

    first = run("first", "tokenizer.min_count=2")
    taken = f"tokenizer.vocabulary={first.path}"
    second = run("second", f"data.dir={new}", taken, f"trainer.init_from={first.path}")
    assert saved_tokenizer(second).vocabulary == saved_tokenizer(first).vocabulary
    assert "brandnew" not in saved_tokenizer(second).vocabulary
    assert saved_corpus(second).splits["train"].unknown > 0  # and it is found again
