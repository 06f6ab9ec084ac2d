"""What a terminal shows: paths as seen from here, and the progress of a loop."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def shown(path: Path) -> Path:
    """The path from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# Of control, of direction, and halves of characters, which bytes that are no UTF-8 become.
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with every character spelled out that a terminal would obey and not show."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def progress_bar(loop: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar on a terminal; none elsewhere, or with TQDM_DISABLE=1 in the environment."""
    from tqdm import tqdm

    disable = True if os.environ.get("TQDM_DISABLE") else None
    return tqdm(loop, disable=disable, dynamic_ncols=True, **options)
