"""The folder of a run: one process at a time, and what its files say."""

import json
import shutil
from pathlib import Path

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json
from mogrifier_lm.runs.folder import MULTIRUN, RunFolder, Status, check_inside, locked
from tests.conftest import ROOT


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


V0 = ROOT / "tests/fixtures/v0/run"  # of an older version, whose files are read as they are


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("summary", ("params",), "many"),
        ("summary", ("hidden_size",), None),
        ("summary", ("tokens_per_second",), [1.0]),
        ("summary", ("test",), "good"),
        ("summary", ("valid", "cache"), [3.5]),
        ("summary", ("test", "dynamic", "token_ppl"), {}),
        ("overrides", ("model.rounds",), [2]),
        ("provenance", ("data",), ["text"]),
        ("provenance", ("data", "sha256"), "0123"),
        ("provenance", ("git",), "clean"),
    ],
)
def test_a_value_of_another_kind_is_damage(
    file: str, place: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    folder = RunFolder(shutil.copytree(V0, tmp_path / "run"))
    path = getattr(folder, file)
    read = getattr(folder, f"read_{file}", lambda: read_json(folder.overrides, {str: str}))
    values = inner = read()
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{path.name} is damaged: .*{place[-1]} is not what"):
        read()


@pytest.mark.parametrize("number", ["7" * 400, "-1e999", "Infinity", "NaN", "null"])
def test_a_number_without_end_is_none(number: str, tmp_path: Path) -> None:
    """Older versions wrote Infinity for a score that is not finite."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(f'{{"tokens": {number}}}\n{{"tokens": 3}}\n')
    assert list(folder.rows()) == [{"tokens": 3}]
    known = '"bits_per_byte": 1, "nats": 1e26, "tokens": 2, "words": 2, "bytes": 3'
    score = f'{{"static": {{"ppl": {number}, "token_ppl": {number}, {known}}}}}'
    folder.summary.write_text(f'{{"valid": {score}, "best_ppl": {number}}}')
    found = folder.read_summary()
    assert found["valid"]["static"]["ppl"] is None and found["best_ppl"] is None


def test_what_wandb_links_to_is_its_own_but_its_folder_leads_nowhere(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    logs = run / "wandb/run-20260101_000000-abc/logs"
    logs.mkdir(parents=True)
    elsewhere.mkdir()
    (logs / "debug-core.log").symlink_to(elsewhere / "core.log")
    check_inside(run)
    check_inside(tmp_path)  # a sweep's
    (run / "wandb/run-20260101_000001-abc").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"run-20260101_000001-abc is a link out of the folder"):
        check_inside(run)
