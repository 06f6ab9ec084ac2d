"""Paths are meant as they are typed, and every text is UTF-8 whatever the machine's locale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mogrifier_lm.config import validate
from mogrifier_lm.launch.explain import EXPECTED, explain
from mogrifier_lm.launch.job import compose
from mogrifier_lm.launch.overrides import PATHS, as_meant
from tests.conftest import ROOT

NAMES = [
    *("a b", "a=b", "a#b", "(a", "[a]", "a'b", 'a"b', "\u6587\u672c", "a,b", "{a}", "a\\b", "a\\"),
    *("a\\'b", "a$b", "x'", "a:b", "%a", "a+b", "null.txt"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_what_was_typed(name: str) -> None:
    folder = f"/x/{name}"
    keys = [key for key in PATHS if not key.startswith("hydra.")]
    node = compose(["data=text", *(f"{key}={folder}" for key in keys)])
    found = [node.data.dir, node.data.cache_dir, node.tokenizer.vocabulary]
    assert [*found, node.trainer.init_from, node.resume] == [folder] * 5


def test_home_quotes_interpolations_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert as_meant("resume=~/x y") == "resume='/home/me/x y'"
    for given in ("resume='a b'", "hydra.run.dir=runs/${seed}", "resume=null", "model.rounds=~"):
        assert as_meant(given) == given
    assert as_meant("data.dir=a,b", several=True) == "data.dir=a,b"
    assert as_meant("data.dir=a,b") == "data.dir='a,b'"


def test_what_is_not_in_the_grammar_is_shown_in_quotes() -> None:
    with pytest.raises(EXPECTED) as caught:
        compose(["tracker.run_name=a(b"])
    line = explain(caught.value)
    assert line.endswith("it is: 'tracker.run_name=\"a(b\"'") and "\n" not in line
    assert compose(['tracker.run_name="a(b"']).tracker.run_name == "a(b"


def test_a_relative_folder_is_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = validate(compose(["data=text", "data.dir=here", "tokenizer.vocabulary=types.txt"]))
    assert config.data.dir == str(tmp_path / "here")
    assert config.tokenizer.vocabulary == str(tmp_path / "types.txt")
    for typed in ("./~here", "~here"):  # nobody's home
        assert validate(compose(["data=text", f"data.dir={typed}"])).data.dir == str(
            tmp_path / "~here"
        )


def without_encoding(path: Path) -> list[int]:
    """Lines that open a text file as the locale says."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and "encoding" not in {k.arg for k in node.keywords}:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of = getattr(getattr(node.func, "value", None), "id", "")
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            binary = any(isinstance(m, str) and m.strip("rwax+") == "b" for m in modes)
            texts = name in ("read_text", "write_text") or (
                name == "open" and of not in ("gzip", "os")
            )
            if texts and not binary and not (name == "read_text" and node.args):
                found.append(node.lineno)
    return found


def test_no_text_file_is_opened_as_the_locale_says(tmp_path: Path) -> None:
    wrong = tmp_path / "x.py"
    wrong.write_text("open(p)\np.open('a')\np.read_text()\nopen(p, 'rb')\n", encoding="utf-8")
    assert without_encoding(wrong) == [1, 2, 3]
    files = [*(ROOT / "mogrifier_lm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert {str(f): found for f in files if (found := without_encoding(f))} == {}


@pytest.mark.slow
def test_a_run_under_the_c_locale_and_of_odd_names(tmp_path: Path) -> None:
    folder, run = tmp_path / "text (1)", tmp_path / "run=[2]"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("un caf\u00e9 noir\n" * 60, encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode("ascii")
        return done.stdout.decode("ascii")

    own = ["data=text", f"data.dir={folder.name}", "data.cache_dir=c", f"hydra.run.dir={run.name}"]
    size = ["model.hidden_size=8", "trainer.batch_size=4", "trainer.bptt=5", "trainer.max_steps=4"]
    command(str(ROOT / "train.py"), *own, *size, "tracker=none")
    assert json.loads((run / "summary.json").read_text("utf-8"))["status"] == "completed"
    text = tmp_path / "t.txt"
    text.write_text("caf\u00e9\n", encoding="utf-8")
    assert "caf\\xe9" in command(str(ROOT / "scripts/score.py"), f"run={run}", f"text={text}")
