"""Files that are written whole or not at all."""

import json
import math
import os
from pathlib import Path

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json, replacing, write_json, write_whole
from mogrifier_lm.runs.folder import RunFolder


def test_values_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert read_json(path) == {}
    with pytest.raises(UserError, match=r"no summary\.json in"):
        read_json(path, required=True)
    write_json(path, {"ppl": math.inf, "list": [1.5, math.nan, {"a": -math.inf}], "n": (2,)})
    assert json.loads(path.read_text()) == {"ppl": None, "list": [1.5, None, {"a": None}], "n": [2]}
    write_json(path, {"ppl": 1.5})
    assert read_json(path) == {"ppl": 1.5} and [p.name for p in tmp_path.iterdir()] == [path.name]
    many = b'{"x": [' + b"{}," * 2**20 + b"0]}"
    for damage in (b'{"ppl": 1.', b"", b"\xff", b"[1]", 10**5 * b"[", many):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"summary\.json is damaged"):
            read_json(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with replacing(path):
        pass
    assert path.read_text() == "old", "nothing was made"
    with pytest.raises(UserError, match=r"nowhere/b\.txt cannot be written: No such file"):
        write_whole(tmp_path / "nowhere" / "b.txt", "")


def test_a_folder_without_a_name_and_half_a_character_are_no_surprise(tmp_path: Path) -> None:
    for folder in (Path("/"), tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            write_whole(folder, "text")
    write_whole(tmp_path / "a.txt", "a\udce9b")
    assert (tmp_path / "a.txt").read_text() == "a\\udce9b"


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    for text in ("first", "second"):
        with replacing(target) as new:
            new.mkdir()
            (new / "ids").write_text(text)
    assert (target / "ids").read_text() == "first" and [*tmp_path.iterdir()] == [target]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """By the next writer of the file, once it is old; in a run's folder by who takes its lock."""
    new, old = (tmp_path / f".a.json.{name}.tmp" for name in ("abcd0123", "abcd4567"))
    new.write_text("")
    old.mkdir()
    (old / "part").write_text("")
    os.utime(old, (0, 0))
    write_json(tmp_path / "a.json", {})
    assert new.exists() and not old.exists()
    folder = RunFolder(tmp_path)
    folder.last.parent.mkdir(parents=True)
    (folder.last.parent / f".{folder.last.name}.0123abcd.tmp").write_text("")
    with folder.locked():
        assert [path.name for path in tmp_path.rglob("*.tmp")] == []
        assert (tmp_path / "a.json").exists()
