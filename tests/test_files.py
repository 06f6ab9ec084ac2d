"""Files of a run: read and written whole, by one process at a time."""

from pathlib import Path

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import locked, read_json, write_json


def test_values_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert read_json(path) == {}
    with pytest.raises(UserError, match=r"no summary\.json in"):
        read_json(path, required=True)
    write_json(path, {"ppl": 1.5})
    assert read_json(path) == {"ppl": 1.5} and [p.name for p in tmp_path.iterdir()] == [path.name]
    for damage in (b'{"ppl": 1.', b"", b"\xff"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"summary\.json is damaged"):
            read_json(path)


def test_a_folder_has_one_holder(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is at work in"):
            locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="/proc/nothing cannot be written to"):
        locked(Path("/proc/nothing")).__enter__()
