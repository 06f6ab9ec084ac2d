"""A part of the fuzzer's cases; `python -m tests.kernels.fuzz` runs more."""

import subprocess
import sys

import pytest

from tests.kernels import fuzz


@pytest.mark.slow
def test_a_call_ends_in_the_references_numbers_or_in_an_error() -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.kernels.fuzz",
        "--cases=450",
        "--seed=3",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]
    equal = [int(line.split()[0]) for line in done.stdout.splitlines() if line.endswith("equal")]
    assert sum(equal) >= 100


@pytest.mark.parametrize("number", [117, 359, 360, 448])
def test_an_empty_sum_is_zero(number: int) -> None:
    """No streams, or no features: what no product writes was left as it lay in memory."""
    assert fuzz.outcome(3, number) in ("native: equal", "native: ValueError")
