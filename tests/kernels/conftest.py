"""Kernels divide their work over threads, so they are tested with two, whatever the machine.

MOGRIFIER_LM_TEST_THREADS sets another number.
"""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("MOGRIFIER_LM_TEST_THREADS", "2")))
    yield
    torch.set_num_threads(threads)
