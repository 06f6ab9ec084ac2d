"""What W&B's files of an offline run hold, read by W&B's own command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mogrifier_lm.errors import UserError


def read_offline(folder: Path) -> dict[str, Any]:
    """What W&B's files in a folder `wandb/offline-run-*` hold, read by `wandb leet inspect`.

    Returns:
        "run" (display_name, run_group, job_type, tags, run_id, project), "config", "summary",
        "state" and "history", the rows.

    Raises:
        UserError: they cannot be read.
    """
    found = records(folder)
    head = json.loads(_inspect(folder, "--summary"))
    return {
        "run": next((r["run"] for r in found if r["type"] == "run"), {}),
        "history": [r["history"]["item"] for r in found if r["type"] == "history"],
        **{key: head[key] for key in ("config", "summary", "state")},
    }


def records(folder: Path) -> list[dict[str, Any]]:
    """All records of such a folder, in order.

    Raises:
        UserError: they cannot be read.
    """
    return [json.loads(line) for line in _inspect(folder).splitlines()]


def _inspect(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"wandb cannot read {folder}: {done.stderr.strip()}")
    return done.stdout
