"""What a user gets wrong is one line that says what, where, and what to do."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands import export, gates, generate, pairs, score
from tests.conftest import ROOT

RUN = ROOT / "tests/fixtures/v0/run"
FILES = {
    "ok.txt": b"kle fur\n", "empty.txt": b"", "bytes.txt": b"a\x00b\xff", "latin.txt": b"caf\xe9\n",
    "fake.gz": b"no", "table.tsv": b"a\tb\nx\ty\n", "ragged.tsv": b"text\titem\nkle\t1\nfur\n",
    "pairs.tsv": b"good\tbad\nkle\tfur\n",
    "bad.jsonl": b'{"sentence_good": 3, "sentence_bad": 4}\n',
}  # fmt: skip

WRONG: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (score.main, {}, "give either text=FILE or split=NAME"),
    (score.main, {"text": "ok.txt", "split": "test"}, "give either text=FILE or split=NAME"),
    (score.main, {"text": "empty.txt"}, "empty.txt is empty"),
    (score.main, {"text": "empty.txt", "column": "a"}, "empty.txt is empty"),
    (score.main, {"text": "empty.txt", "page": "x.html"}, "there is no text to score"),
    (score.main, {"text": "bytes.txt"}, "bytes.txt is not UTF-8"),
    (score.main, {"text": "bytes.txt", "column": "a"}, "bytes.txt is not UTF-8"),
    (score.main, {"text": "latin.txt"}, "latin.txt is not UTF-8: byte 0xe9 at offset 3, line 1"),
    (score.main, {"text": "fake.gz"}, "fake.gz cannot be read"),
    (score.main, {"text": "fake.gz", "column": "a"}, "fake.gz cannot be read"),
    (score.main, {"text": "nowhere"}, "nowhere cannot be read: No such file"),
    (score.main, {"text": "folder"}, "folder cannot be read: Is a directory"),
    (score.main, {"text": "table.tsv", "column": "c"}, "no column c, its columns are a, b"),
    (score.main, {"text": "table.tsv", "column": "a", "item": "c"}, "no column c"),
    (score.main, {"text": "table.tsv", "item": "b"}, "give column=NAME"),
    (score.main, {"text": "ragged.tsv", "column": "text", "item": "item"}, "line 3: a row has not"),
    (score.main, {"text": "ok.txt", "unit": "word"}, "unit is 'word', it must be one of line"),
    (score.main, {"text": "ok.txt", "unit": "item"}, "unit=item needs a table"),
    (score.main, {"text": "ok.txt", "edge": "top"}, "edge is 'top', it must be one of right, left"),
    (score.main, {"text": "ok.txt", "top": -1}, "top is -1, it must be at least 0"),
    (score.main, {"text": "ok.txt", "to": "no/x.tsv"}, "no/x.tsv cannot be written: No such"),
    (score.main, {"text": "ok.txt", "to": "folder"}, "folder cannot be written: Is a directory"),
    (score.main, {"text": "ok.txt", "page": "no/x.html"}, "no/x.html cannot be written"),
    (score.main, {"text": "ok.txt", "page": "x.html", "to": "x.tsv"}, "to=FILE are of tables"),
    (score.main, {"text": "ok.txt", "other": "run"}, "give page=FILE.html"),
    (score.main, {"text": "ok.txt", "save": "x"}, "with text=FILE give to=FILE"),
    (score.main, {"text": "ok.txt", "device": "tpu9"}, "^device=tpu9 cannot be used here"),
    (score.main, {"text": "ok.txt", "run": "nowhere"}, "no folder nowhere"),
    (score.main, {"text": "ok.txt", "run": "ok.txt"}, "no folder ok.txt"),
    (score.main, {"text": "ok.txt", "run": "folder"}, "no config.yaml in folder"),
    (score.main, {"text": "ok.txt", "run": "begun"}, "begun has no weights yet: its first valid"),
    (score.main, {"text": "ok.txt", "run": "damaged"}, "damaged/checkpoints/best/.* is damaged"),
    (score.main, {"split": "tset"}, "no split tset; did you mean test"),
    (generate.main, {"temperature": 0.0}, "temperature is 0.0, it must be between"),
    (generate.main, {"number": 5000}, "number is 5000, it must be between 1 and 4,096"),
    (generate.main, {"max_words": 0}, "max_words is 0, it must be between 1"),
    (generate.main, {"prompt": "caf\udce9"}, "is not UTF-8: 'caf"),
    (generate.main, {"run": "begun"}, "begun has no weights yet"),
    (gates.main, {"line": " "}, "line= is empty"),
    (gates.main, {"line": "a\nb"}, "the line holds a line break"),
    (pairs.main, {"pairs": "bad.jsonl"}, "a line is no object with sentence_good"),
    (pairs.main, {"pairs": "table.tsv"}, "has the columns a, b, it needs good and bad"),
    (pairs.main, {"pairs": "empty.txt"}, "empty.txt holds no pairs"),
    (pairs.main, {"pairs": "latin.txt"}, "latin.txt is not UTF-8"),
    (pairs.main, {"pairs": "folder"}, "folder cannot be read"),
    (pairs.main, {"pairs": "pairs.tsv", "save": "no/x"}, "no/x cannot be written"),
    (export.main, {"to": "ok.txt"}, "ok.txt is there already"),
    (export.main, {"to": "new", "run": "running"}, "running has not completed"),
    (export.main, {"to": "new", "run": "away"}, "away was exported itself"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("run", "begun", "running", "damaged", "away"):
        shutil.copytree(RUN, folder / name)
    (folder / "folder").mkdir()
    for path in ("begun/checkpoints/best/model.safetensors", "running/summary.json",
                 "away/provenance.json"):  # fmt: skip
        (folder / path).unlink()
    weights = folder / "damaged/checkpoints/best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("main, arguments, says", WRONG)
def test_what_is_wrong_is_one_line(
    main: Callable[..., None],
    arguments: dict[str, Any],
    says: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=says) as caught:
        main(**{"run": "run"} | arguments)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"
    if main is score.main:
        assert not capsys.readouterr().out, "no table without rows"


def test_a_run_in_progress_gives_its_best_weights_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    load_model("run")
    assert not caplog.text
    load_model("running")
    assert "running has not completed: these are its best weights so far" in caplog.text


def test_a_text_of_unknown_words_alone_says_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "unknown.txt.gz").write_bytes(gzip.compress(b"Xyzzy Plugh\nXyzzy\n"))
    score.main(run="run", text="unknown.txt.gz", to="out.tsv")
    said = capsys.readouterr().err.splitlines()[-1]
    assert "5 words" in said and "the model knows none of the words" in said
