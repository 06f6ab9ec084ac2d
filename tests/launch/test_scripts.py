"""score.py and generate.py on run folders of both tokenizers."""

import gzip
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mogrifier_lm.config import save_config, validate
from mogrifier_lm.data import WordTokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import _call
from mogrifier_lm.launch.commands import generate as generate_command
from mogrifier_lm.launch.commands import prepare_data
from mogrifier_lm.launch.commands import score as score_command
from mogrifier_lm.runs.build import saved_tokenizer
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.runs.run import run
from tests.conftest import ROOT, compose_config

Main = Callable[..., None]
score: Main = score_command.main
generate: Main = generate_command.main
SUBWORDS = ["tokenizer=sentencepiece", "tokenizer.vocab_size=300"]


@pytest.fixture(params=[[], SUBWORDS], ids=["word", "sentencepiece"])
def trained(request: pytest.FixtureRequest, small: list[str], tmp_path: Path) -> Path:
    config = validate(compose_config([*small, *request.param]))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save_config(config, RunFolder(run_dir).config)
    run(config, RunFolder(run_dir))
    return run_dir


def test_prepared_text_is_counted(
    text_dir: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = prepare_data.main
    where = ["data=text", f"data.dir={text_dir}", f"data.cache_dir={cache_dir}"]
    for tokenizer in ([], SUBWORDS):
        prepare(*where, *tokenizer)
        table = capsys.readouterr().out.splitlines()
        kind = "300 types of sentencepiece" if tokenizer else r"\d+ types of word"
        assert re.fullmatch(f"text: {kind} tokens", table[0])
        for name, line in zip(("train", "valid", "test"), table[2:], strict=True):
            text = (text_dir / f"{name}.txt").read_text()
            words = len(text.split()) + text.count("\n")
            found = line.replace(",", "").split()
            assert found[:2] == [name, str(words)]
            assert (int(found[2]) > words) is bool(tokenizer)
    with pytest.raises(UserError, match="only the keys of data and tokenizer"):
        prepare(*where, "model.rounds=1")


def rows(text: str) -> list[tuple[str, float]]:
    return [(line.split("\t")[0], float(line.split("\t")[1])) for line in text.splitlines()]


def test_the_words_add_up_to_the_score(
    trained: Path, text_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = trained / "words.tsv"
    capsys.readouterr()
    score(run=str(trained), split="test", save=str(saved))
    static = json.loads((trained / "summary.json").read_text())["test"]["static"]
    found = re.search(r"perplexity ([\d.]+)\n", capsys.readouterr().out)
    assert found and float(found[1]) == pytest.approx(static["ppl"], rel=1e-5, abs=0.006)
    for name in ("words_test.md", "words_test.png"):
        assert (trained / name).stat().st_size > 500
    table = rows(saved.read_text().partition("\n")[2])
    lines = (text_dir / "test.txt").read_text().splitlines()
    tokenizer = saved_tokenizer(RunFolder(trained))
    known = tokenizer.decode_words(tokenizer.encode(lines))
    assert [word for word, _ in table] == known
    assert sum(nats for _, nats in table) == pytest.approx(static["nats"], rel=1e-5)

    words = [w for line in lines for w in [*line.split(), "<eos>"]]
    packed = trained / "text.txt.gz"
    packed.write_bytes(gzip.compress((text_dir / "test.txt").read_bytes()))
    score(run=str(trained), text=str(packed), unit="text", edge="left", to=f"{trained}/w.jsonl.gz")
    found = [json.loads(line) for line in gzip.open(trained / "w.jsonl.gz", "rt")]
    assert [row["word"] for row in found] == words
    assert [row["nats"] for row in found] == pytest.approx([n for _, n in table], abs=1e-4)
    unknown = sum(word != seen for word, seen in zip(words, known, strict=True))
    assert sum(row["unk"] for row in found) == unknown
    assert (unknown > 0) == isinstance(tokenizer, WordTokenizer)
    told = capsys.readouterr().err
    assert told.startswith(f"unit=text: {len(words):,} words, ") and ("<unk>" in told) == (
        unknown > 0
    )


def test_a_table_of_items_is_scored(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "items.tsv"
    table.write_text("item\tsentence\n1\tthe a\n1\tof\n2\tthe a\n")
    capsys.readouterr()
    score(run=str(trained), text=str(table), column="sentence", item="item", top=2)
    out, told = capsys.readouterr()
    head, *rows_ = [line.split("\t") for line in out.splitlines()]
    assert head[:4] == ["item", "sentence", "position", "word"] and head[-1] == "guesses"
    assert [row[:4] for row in rows_][2:6] == [
        ["1", "1", "3", "<eos>"], ["1", "2", "1", "of"], ["1", "2", "2", "<eos>"],
        ["2", "3", "1", "the"],
    ]  # fmt: skip
    assert [r[4:6] for r in rows_[:3]] == [r[4:6] for r in rows_[5:8]]  # each item by itself
    assert all(len(row[-1].split()) == 2 for row in rows_) and told.startswith("unit=item: 8 words")
    for wrong, says in (
        ({"text": str(table), "item": "item"}, "give column=NAME"),
        ({"text": str(table), "column": "words"}, "has no column words"),
        ({"text": os.devnull}, "is empty"),
    ):
        with pytest.raises(UserError, match=says):
            score(run=str(trained), **wrong)


def test_a_run_folder_by_itself_scores_text_and_writes_text(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(trained, tmp_path / "alone")
    (alone / "config.yaml").write_text(
        (trained / "config.yaml").read_text().replace("  dir: /", "  dir: /nowhere/")
    )
    generate(run=str(alone), max_words=25, seed=4)
    drawn = capsys.readouterr().out
    generate(run=str(alone), max_words=25, seed=4)
    assert capsys.readouterr().out == drawn and len(drawn.strip()) > 4
    with pytest.raises(UserError, match="data.dir: no folder /nowhere/"):
        score(run=str(alone), split="test")


def test_the_text_of_another_corpus_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(" ".join(f"w{i}" for i in range(999)) + "\n")
    config = (trained / "config.yaml").read_text()
    (dir_line,) = [line for line in config.splitlines() if line.startswith("  dir: ")]
    (trained / "config.yaml").write_text(config.replace(dir_line, f"  dir: {folder}"))
    with pytest.raises(UserError, match="text is not the one of the run"):
        score(run=str(trained), split="test")


def test_arguments_are_checked() -> None:
    for arguments, message in {
        ("run=x", "splt=test"): "unknown key splt; did you mean split?",
        ("run=x", "min_count=many"): "min_count=many: the value must be of type int",
        ("run=x", "--split"): "--split is not KEY=VALUE",
        ("split=test",): "give run=",
        ("run=x",): "give either text=FILE or split=NAME",
        ("run=x", "split=test", "text=-"): "give either text=FILE or split=NAME",
    }.items():
        with pytest.raises(UserError) as caught:
            _call(score, arguments)
        assert str(caught.value).startswith(message)


def test_arguments_are_read_as_their_parameters_say(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[object, ...]] = []

    def main(
        *folders: Path,
        out: Path | None = None,
        ok: bool = True,
        what: list[int] | None = None,
        name: str = "",
    ) -> None:
        seen.append((folders, out, ok, what, name))

    for arguments, expected in {
        (): ((), None, True, None, ""),
        ("a/b", "runs/x=1", "out=c=d", "ok=False"): (
            (Path("a/b"), Path("runs/x=1")), Path("c=d"), False, None, "",
        ),
        ("what=[1, 2]", "name=he: [x]", "out=null"): ((), None, True, [1, 2], "he: [x]"),
        ("what=4,5", "name=010"): ((), None, True, [4, 5], "010"),
    }.items():  # fmt: skip
        _call(main, arguments)
        assert seen.pop() == expected
    for argument, message in {
        "ok=maybe": "ok=maybe: the value must be true or false",
        "what=1,x": "what=1,x: the value must be of type int",
        "ot=x": "unknown key ot; did you mean out?",
    }.items():
        with pytest.raises(UserError) as caught:
            _call(main, [argument])
        assert str(caught.value) == message and not seen


COMMANDS = sorted(
    path.stem
    for path in (ROOT / "mogrifier_lm/launch/commands").glob("*.py")
    if path.stem[0] != "_"
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_manual_and_a_door(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"mogrifier_lm.launch.commands.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", "--help"])
        runpy.run_path(str(ROOT / f"scripts/{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown == module.__doc__.strip() + "\n" and f"python scripts/{name}.py" in shown
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    target = f"mogrifier_lm.launch.commands.{name}:command"
    assert declared[f"mogrifier-{name.replace('_', '-')}"] == target


def test_debug_shows_the_whole_of_an_error(tmp_path: Path) -> None:
    for name in ("report", "evaluate"):
        where = [f"run={tmp_path}"] if name == "evaluate" else [str(tmp_path)]
        command = [sys.executable, str(ROOT / f"scripts/{name}.py"), *where, "debug=true"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_error_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/generate.py"), f"run={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: no config.yaml in {tmp_path}, so it is not a run's folder\n"


def test_an_error_of_the_model_has_its_key_where_it_has_one() -> None:
    from mogrifier_lm.options import ModelConfig
    from mogrifier_lm.runs.build import build_model

    with pytest.raises(
        UserError, match="^model.backend is native: the native backend has no mlstm cell"
    ):
        build_model(ModelConfig(cell="mlstm", backend="native", hidden_size=8), 20)
    with pytest.raises(UserError, match="^model.rank is 99"):
        build_model(ModelConfig(rank=99, hidden_size=8), 20)
