"""What a terminal shows: paths as seen from here, and the progress of a loop."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def shown(path: Path) -> Path:
    """The path from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def progress_bar(loop: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar on a terminal; none elsewhere, or with TQDM_DISABLE=1 in the environment."""
    from tqdm import tqdm

    disable = True if os.environ.get("TQDM_DISABLE") else None
    return tqdm(loop, disable=disable, dynamic_ncols=True, **options)
