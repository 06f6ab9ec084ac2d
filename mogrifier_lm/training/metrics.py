"""The log of metrics: one JSON object a line, which grows, and is cut to a checkpoint's moment."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mogrifier_lm.files import naming

log = logging.getLogger(__name__)


def append(path: Path, row: Mapping[str, float]) -> int:
    """Write a row, without what is not finite; returns the length of the log in bytes.

    Raises:
        UserError: it cannot be written; what was written of the line is cut by `cut`.
    """
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({k: v for k, v in row.items() if math.isfinite(v)}) + "\n")
        return file.tell()


def cut(path: Path, length: int) -> int:
    """Take the log back to so many bytes; returns how many it has.

    A log that is shorter than that, as after a loss of files, keeps its whole lines, and one line
    says so.
    """
    present = path.stat().st_size if path.is_file() else 0
    if present < length:
        log.warning("%s lacks lines of before the checkpoint: its curves have a gap", path)
        length = path.read_bytes().rfind(b"\n") + 1 if present else 0
    if present > length:
        os.truncate(path, length)
    return length
