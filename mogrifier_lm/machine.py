"""The machine that a process runs on, and what it was started among."""

import os
from pathlib import Path

RANK = int(os.environ.get("RANK", 0))  # of this process, from 0
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # of one run; torchrun sets both


def lent_cores() -> int:
    """Cores that this process may use: lent by SLURM, else those that it may be scheduled on."""
    if lent := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(lent)
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_info(*fields: str) -> str | None:
    """What Linux says of the processor under the first of these names that it knows; else None."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        return None
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith(fields)), None)
