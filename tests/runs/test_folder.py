"""The folder of a run: one process at a time, and what its files say."""

import json
from pathlib import Path

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.runs.folder import MULTIRUN, RunFolder, Status, locked


def test_a_folder_has_one_holder(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is at work in"):
            RunFolder(tmp_path / "run").locked().__enter__()
    with locked(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="/proc/nothing cannot be written to"):
        locked(Path("/proc/nothing")).__enter__()


def test_what_a_folder_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "sweep" / "3")
    folder.path.mkdir(parents=True)
    assert not (folder.is_run() or folder.has_begun() or folder.has_trained() or folder.sweep())
    folder.overrides.write_text("{}")
    assert folder.is_run() and not folder.has_begun()
    folder.config.write_text("")
    assert folder.has_begun() and not folder.has_trained()
    folder.best.parent.mkdir(parents=True)
    folder.best.write_text("")
    assert folder.has_trained()
    (tmp_path / "sweep" / MULTIRUN).write_text("")
    assert folder.sweep() == (tmp_path / "sweep").resolve()
    folder.end(Status.PRUNED, "hopeless", seed=3)
    assert folder.read_summary() == {"status": "pruned", "error": "hopeless", "seed": 3}
    assert json.loads(folder.summary.read_text())["status"] == Status.PRUNED


def test_rows_are_the_whole_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert list(folder.rows()) == []
    folder.metrics.write_bytes(
        b'{"step": 1, "tokens": 9}\n\xff\xfe\n[1]\n{"step": 2, "tokens": 18, "valid/ppl": 8.0}\n'
        b'{"step": 3, "tokens": 27}\n{"step": "4", "tokens": 36}\n{"step": 5, "tokens": 36, "va'
    )
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    assert list(folder.rows("valid/ppl")) == [{"step": 2, "tokens": 18, "valid/ppl": 8.0}]
