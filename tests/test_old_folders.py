"""Folders that an older version left are read as they were: tests/fixtures/make.py made them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm import load_model
from tests.conftest import main
from tests.fixtures.make import EVALUATIONS, FOLDER, RESUMED, SWEEP, call, nats, rows

FIGURES: dict[str, Any] = json.loads((FOLDER / "figures.json").read_text())
# Sums of float32 in another order, as other kernels and processors take them, move nats by 1e-6 of
# themselves. A temperature, a rule or a mask that is another one moves them by 1e-4 or more.
NATS = 2e-5
# Twenty steps of training carry such a difference on.
CURVE = 2e-4


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, and the place where their commands are given."""
    folder = tmp_path / "v0"
    shutil.copytree(FOLDER, folder)
    monkeypatch.chdir(folder)
    return folder


def test_its_model_is_loaded(old: Path) -> None:
    summary = json.loads((old / "run/summary.json").read_text())
    assert load_model("run").num_params() == summary["params"]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_its_scores_are_found_again(name: str, old: Path) -> None:
    """ "as saved" has temperatures in its config.yaml, which multiplied the logits then."""
    path = old / "run/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"valid": {}, "test": {}}))
    main("scripts/evaluate.py", ["run=run", *EVALUATIONS[name]])
    found, expected = nats(old / "run"), FIGURES["evaluations"][name]
    assert found.keys() == expected.keys()
    for split, figures in expected.items():
        assert found[split] == pytest.approx(figures, rel=NATS), split


def test_it_is_gone_on_with(old: Path) -> None:
    done = call("train.py", RESUMED, old)
    assert done.returncode == 0, done.stderr
    found, expected = rows(old / "run"), FIGURES["resumed"]
    kept = len(rows(FOLDER / "run"))
    assert found[:kept] == expected[:kept], "what was logged before is kept as it is"
    assert len(found) == len(expected) > kept
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=CURVE)


def test_its_reports_are_made_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(old / "sweep/report")
    main("scripts/report.py", ["sweep"])
    table = Path("sweep/report/sweep.csv").read_bytes()
    assert table == (FOLDER / "sweep/report/sweep.csv").read_bytes()
    assert "6 runs: 4 completed, 2 failed" in Path("sweep/report/sweep.md").read_text()
    capsys.readouterr()
    main("scripts/report.py", ["run"])
    summary = json.loads((old / "run/summary.json").read_text())
    assert f"{summary['test']['cache']['ppl']:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_its_sweep_is_gone_on_with(old: Path) -> None:
    done = call("train.py", ["-m", *SWEEP], old)
    assert done.returncode == 1 and "model.rounds is -1" in done.stderr, done.stderr
    skipped = [f"{Path('sweep', str(job))} is completed: skipped" for job in range(4)]
    assert all(line in done.stdout + done.stderr for line in skipped), done.stdout + done.stderr
    table = (old / "sweep/report/sweep.csv").read_bytes()
    assert table == (FOLDER / "sweep/report/sweep.csv").read_bytes()
