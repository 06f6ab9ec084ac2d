"""Where a run comes from: code, versions, machine, command. The head of provenance.json."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mogrifier_lm.machine import cpu_info

PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "datasets", "wandb", "sentencepiece",
            "safetensors")  # fmt: skip
MAX_DIFF = 2**20
"""Bytes of `git diff HEAD` that are kept."""


def collect(repo: Path | None = None) -> dict[str, Any]:
    """Describe this process in values that json can write. Takes less than half a second.

    What a run computes on, and with which kernels and data, it says itself.

    Args:
        repo: a folder inside the checkout of the code; default: the one this package lies in.

    Returns:
        The machine's name is left out on purpose. "git" is None outside a checkout (an installed
        wheel) and where git is missing; versions of absent packages are None.
    """
    import torch

    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": _git(repo or Path(__file__).parent),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",
        "cpu": {
            "model": cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def cpu_model() -> str | None:
    """The processor's name; None where the system does not say."""
    return cpu_info("model name") or platform.processor() or None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit, branch (None when detached), dirty, diff of the checkout that tracks the folder.

    A new file that git does not track makes the checkout dirty, but is not in the diff.
    """

    def git(*arguments: str) -> bytes:
        # Without optional locks, and so without disturbing a git command the user runs meanwhile.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout

    try:
        # A wheel may be installed below an unrelated checkout (its .venv): that is not our code.
        if not git("ls-files", "--", "."):
            return None
        commit = git("rev-parse", "HEAD").decode().strip()
        branch = git("rev-parse", "--abbrev-ref", "HEAD").decode().strip()
        diff = git("diff", "--no-ext-diff", "--no-color", "HEAD")
        status = git("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    text = diff[:MAX_DIFF].decode(errors="replace")
    if len(diff) > MAX_DIFF:
        text += f"\n[cut: {len(diff)} bytes in all]\n"
    return {
        "commit": commit,
        "branch": None if branch == "HEAD" else branch,
        "dirty": bool(status.strip()),
        "diff": text,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
