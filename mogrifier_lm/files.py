"""Files that several processes may read and write."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mogrifier_lm.errors import UserError
from mogrifier_lm.terminal import shown


def cache_folder(*parts: str) -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/mogrifier_lm, or a folder below it; it may not be there yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home.joinpath("mogrifier_lm", *parts)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of a run, whole or not at all."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(values, indent=2) + "\n")
    tmp.replace(path)


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The values in a file of a run; {} where there is no file.

    Raises:
        UserError: it is damaged, or `required` and not there.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        if required:
            raise UserError(f"no {path.name} in {path.parent}, so it is not a whole run") from None
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return values


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which one process at a time may write to; ends with the process at latest.

    Args:
        folder: is made if it is not there.
        wait: until it is free.

    Raises:
        UserError: another process holds it, and `wait` is false; it cannot be written to.
    """
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is at work in {shown(folder)}: wait for its end, or end it"
        ) from None
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be written to ({error.strerror}): take a copy of it"
        ) from error
    try:
        yield
    finally:
        lock.release()
