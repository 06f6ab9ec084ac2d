"""scripts/torture.py, a part of it: all of it takes an hour of one core."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_what_is_killed_ends_as_what_is_not(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/torture.py"), "kills=8", "events=12", "seed=7",
               f"out={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(.*): (\d+) kills, (\d+) as without a kill$", done.stdout, re.MULTILINE)
    assert all(kills == same for _, kills, same in found)
    events = {f"{what}, at a file event" for what in ("all", "sweep", "evaluation")}
    assert {what for what, _, _ in found} == events | {"run, at random moments"}
