"""What a terminal shows: paths as seen from here, and the progress of a loop, or the log of it."""

import logging
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LINES = 60.0
"""Seconds between lines that tell how far a loop is, where there is no terminal."""


def shown(path: Path) -> Path:
    """The path from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# Of control, of direction, and halves of characters, which bytes that are no UTF-8 become.
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with every character spelled out that a terminal would obey and not show."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Log:
    """A file whose lines go to the log."""

    def write(self, text: str) -> None:
        if line := text.strip():
            log.info("%s", line)

    def flush(self) -> None: ...


def progress_bar(loop: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar on a terminal; elsewhere, or with TQDM_DISABLE=1 in the environment, a line of the
    log every LINES seconds."""
    from tqdm import tqdm

    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        text = "{desc}{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        options |= {"file": _Log(), "bar_format": text, "miniters": 1, "leave": False}
        options |= {"mininterval": LINES, "delay": LINES}
    return tqdm(loop, disable=False, dynamic_ncols=True, **options)
