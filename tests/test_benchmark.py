"""The benchmark runs, and times only what agrees with the reference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mogrifier_lm.kernels.recurrence import BACKENDS
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_benchmark_times_every_backend_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--seconds", "0.1"]
    options = [
        "--what",
        "evaluate",
        "--threads",
        "1",
        "--tokens",
        "20",
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["candidate"] for row in rows} == set(BACKENDS)
    assert all(row["ms"] > 0 or row["not timed"] for row in rows)
    assert all(row["candidate"] in done.stdout for row in rows)
