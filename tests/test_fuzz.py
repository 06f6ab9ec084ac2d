"""The fuzzing finds what it looks for, and finds nothing in this version."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mogrifier_lm.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts/fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted(ends: Any) -> Any:
    def case(home: Path, folder: Path, r: random.Random) -> None:
        if isinstance(ends, BaseException):
            raise ends
        if ends:
            print(ends)

    return case


@pytest.mark.parametrize(
    ("ends", "found"),
    [
        (TypeError("x"), "TypeError"),
        (UserError(""), ""),
        (UserError("model.rounds is -3, it must be at least 0"), ""),
        (SystemExit(0), "without a line"),
        (RecursionError(), "RecursionError"),
        ("not finite: test static", "not finite"),
        (None, ""),
    ],
)
def test_what_is_no_end_for_a_user_is_found(
    fuzz: ModuleType, ends: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "LIGHT", [planted(ends)])
    monkeypatch.setattr(fuzz, "HEAVY", [planted(ends)])
    _, wrong = fuzz.one(3, 1, tmp_path)
    assert found in wrong and bool(found) == bool(wrong)


def test_a_case_is_made_from_its_number_and_the_seed(fuzz: ModuleType) -> None:
    raw = bytes(range(256)) * 20
    made = [fuzz.damaged(raw, random.Random(f"4/{n}")) for n in (0, 0, 1)]
    assert made[0] == made[1] != made[2] != raw


@pytest.mark.slow
def test_cases_that_no_one_would_type_end_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/fuzz.py"), "cases=200", "seed=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 cases" in done.stdout and "0 did not pass" in done.stdout
    for kind in ("trained", "checkpoint", "resumed", "report"):
        assert kind in done.stdout
