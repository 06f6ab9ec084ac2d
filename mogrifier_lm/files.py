"""Files that several processes may read and write."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mogrifier_lm.errors import UserError
from mogrifier_lm.terminal import shown

MAX_JSON = 2**25  # bytes: a vocabulary of a million words is half of it


def cache_folder(*parts: str) -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/mogrifier_lm, or a folder below it; it may not be there yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home.joinpath("mogrifier_lm", *parts)


def digest(*values: object) -> str:
    """A name of 16 characters for values that json can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def fill_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then rename it: whole or not there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tmp-"))
    except OSError as error:
        raise UserError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}): "
            "give data.cache_dir=FOLDER"
        ) from error
    try:
        fill(tmp)
        tmp.chmod(0o755)
        try:
            tmp.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of a run, whole or not at all."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(values, indent=2) + "\n")
    tmp.replace(path)


def read_text(path: Path, most: int) -> str:
    """A file in UTF-8 of at most so many bytes.

    Raises:
        UserError: it is larger; one that is not UTF-8 is a `UnicodeDecodeError`.
    """
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise UserError(f"{path} is larger than {most:,} bytes, which no run writes")
    return raw.decode()


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in a file of a run; {} where there is no file.

    Raises:
        UserError: it is damaged, holds something else, or is `required` and not there.
    """
    try:
        values = json.loads(read_text(path, MAX_JSON))
        if not isinstance(values, dict):
            raise UserError(f"{path} is damaged: it does not hold an object")
    except FileNotFoundError:
        if required:
            raise UserError(f"no {path.name} in {path.parent}, so it is not a whole run") from None
        return {}
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
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
