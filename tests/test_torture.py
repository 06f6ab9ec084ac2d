"""scripts/torture.py, a part of it: all of it takes an hour of one core."""

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
    lines = done.stdout.splitlines()
    assert len(lines) >= 5 and all("as without a kill" in line for line in lines)
