"""What is known of the machine."""

import os

import pytest

from mogrifier_lm.machine import cpu_info, lent_cores


def test_the_cores_that_are_lent_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert lent_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert lent_cores() == 7
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert lent_cores() == 3


def test_what_the_system_does_not_say_of_the_processor_is_none() -> None:
    assert cpu_info("processor") == "0"
    assert cpu_info("nothing of the kind") is None
    assert cpu_info("nothing of the kind", "processor") == "0"
