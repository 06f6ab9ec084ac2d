import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mogrifier_lm.data import Corpus, load_corpus
from mogrifier_lm.errors import UserError
from mogrifier_lm.options import Counts, DataConfig
from tests.conftest import ROOT, compose_config

REAL = os.environ.get("MOGRIFIER_LM_DATA")
needs_real_text = pytest.mark.skipif(not REAL, reason="MOGRIFIER_LM_DATA is not set")


def write(folder: Path, **splits: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in splits.items():
        raw = text.encode() if isinstance(text, str) else text
        (folder / f"{split}.txt").write_bytes(raw)
    return folder


def load(folder: Path, cache: Path) -> Corpus:
    return load_corpus(DataConfig(name="text", dir=str(folder), cache_dir=str(cache)))


def test_one_eos_ends_each_line_blank_lines_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train=" a b \n \n a\n", valid="b", test="b a\r\n\n")
    corpus = load(folder, tmp_path / "c")
    decode = corpus.tokenizer.vocabulary.__getitem__
    tokens = {name: [decode(i) for i in split.ids] for name, split in corpus.splits.items()}
    assert tokens["train"] == ["a", "b", "<eos>", "<eos>", "a", "<eos>"]
    assert tokens["valid"] == ["b", "<eos>"]
    assert tokens["test"] == ["b", "a", "<eos>", "<eos>"]
    train = corpus.splits["train"]
    assert (train.words, train.bytes) == (6, len("a b\n\na\n"))


def test_vocabulary_comes_from_training_text_by_falling_frequency(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train="z z y y x\n", valid="x new\n", test="x\n")
    corpus = load(folder, tmp_path / "c")
    assert corpus.tokenizer.vocabulary == ["y", "z", "<eos>", "x", "<unk>"]
    assert corpus.tokenizer.decode(corpus.splits["valid"].ids) == "x <unk>\n"


def test_no_unk_is_added_where_none_is_needed(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "t", train="a b\n", valid="a\n", test="b\n"), tmp_path / "c")
    assert "<unk>" not in corpus.tokenizer.vocabulary


def test_cache_follows_the_content_not_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train="a b\n", valid="a\n", test="b\n")
    first = load(folder, tmp_path / "c")
    assert isinstance(load(folder, tmp_path / "c").splits["train"].ids, np.memmap)
    write(folder, train="a b c\n")
    second = load(folder, tmp_path / "c")
    assert (len(first.tokenizer), len(second.tokenizer)) == (3, 4)
    assert len(list((tmp_path / "c" / "tokens").iterdir())) == 2


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": "a\n", "valid": "a\n"}, r"no test.txt in .*t: a corpus is"),
        ({"train": "", "valid": "a\n", "test": "a\n"}, "train.txt is empty"),
        ({"train": " \n \n", "valid": "a\n", "test": "a\n"}, "train.txt is empty"),
        (
            {"train": b"good\nalso \xff bad\n", "valid": "a\n", "test": "a\n"},
            r"train.txt is not UTF-8: byte 0xff at offset 10, line 2",
        ),
        ({"train": "b\n<eos> a\n", "valid": "a\n", "test": "a\n"}, "train.txt, line 2 .*<eos>"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, splits: dict[str, str | bytes], message: str) -> None:
    folder = write(tmp_path / "t", **splits)
    with pytest.raises(UserError, match=message):
        load(folder, tmp_path / "c")
    assert not list((tmp_path / "c").glob("tokens/*/*.ids")), "a half-written cache entry is left"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.dir: no folder .*nowhere"):
        load(tmp_path / "nowhere", tmp_path / "c")


def test_counts_that_differ_from_the_published_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "t", train="a b\n", valid="a\n", test="b\n")
    expected = Counts(types=3, train=929589)
    cache = str(tmp_path / "c")
    load_corpus(DataConfig(name="ptb", dir=str(folder), expected=expected, cache_dir=cache))
    assert [r.getMessage() for r in caplog.records] == [
        "ptb: 3 train tokens, published 929,589: perplexities do not compare with the literature's"
    ]


def test_local_text_needs_neither_datasets_nor_wandb(text_dir: Path, cache_dir: Path) -> None:
    code = f"""
import sys
sys.modules["datasets"] = sys.modules["wandb"] = sys.modules["sentencepiece"] = None
sys.argv = ["train.py", "data=text", "data.dir={text_dir}", "data.cache_dir={cache_dir}",
    "trainer.max_steps=2", "trainer.batch_size=4", "model.hidden_size=8", "tracker=none",
    "hydra.run.dir={cache_dir}/run"]
from mogrifier_lm.launch.cli import train
train()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@needs_real_text
@pytest.mark.parametrize("name", ["ptb", "wikitext2"])
def test_real_corpora_have_their_published_counts(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mogrifier_lm.config import validate

    config = validate(compose_config([f"data={name}", f"data.cache_dir={tmp_path}"])).data
    start = time.process_time()
    corpus = load_corpus(config)
    assert time.process_time() - start < 10
    start = time.process_time()
    corpus = load_corpus(config)
    assert time.process_time() - start < 1
    assert not caplog.records
    assert config.expected is not None
    assert len(corpus.tokenizer) == config.expected.types
    for split in ("train", "valid", "test"):
        assert len(corpus.splits[split].ids) == getattr(config.expected, split)
        assert corpus.splits[split].words == getattr(config.expected, split)


def flipped(raw: bytes) -> bytes:
    return raw[:40] + bytes([raw[40] ^ 1]) + raw[41:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.ids", flipped),
        ("valid.ids", lambda raw: raw[:-2]),
        ("test.ids", lambda raw: raw[:-1]),
        ("train.ids", lambda raw: b""),
        ("splits.json", lambda raw: b'{"train": {"words": 1}}'),
        ("vocabulary.json", flipped),
    ],
)
def test_damage_in_the_cache_is_not_trained_on(
    name: str, damage: Callable[[bytes], bytes], text_dir: Path, tmp_path: Path
) -> None:
    source = DataConfig(name="text", dir=str(text_dir), cache_dir=str(tmp_path))
    load_corpus(source)
    (file,) = tmp_path.glob(f"**/{name}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="is damaged"):
        load_corpus(source)
