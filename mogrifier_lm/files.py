"""Files that are written whole or not at all, and where caches lie."""

import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mogrifier_lm.errors import UserError
from mogrifier_lm.terminal import plain, shown

# Bytes, a vocabulary of a million words is half of them; lists and objects.
MAX_JSON, MAX_PARTS = 2**25, 2**20
ORPHANS = ".*.tmp"
"""What `replacing` leaves behind where its process is killed."""
ABANDONED = 24 * 3600.0
"""Seconds after which such a file has no writer any more, also where nobody holds a lock."""


def cache_folder(*parts: str) -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/mogrifier_lm, or a folder below it; it may not be there yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home.joinpath("mogrifier_lm", *parts)


def digest(*values: object) -> str:
    """A name of 16 characters for values that json can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a free name; the file or folder made under it takes the place of `path`.

    Nothing is replaced where nothing was made. A kill or a power cut at any moment leaves what was
    there before or what is new, because the bytes are on the disk before the name is theirs. Of a
    folder that another process has filled meanwhile, that one's stays.

    Raises:
        UserError: it cannot be written, because the disk is full, say.
    """
    for orphan in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - orphan.stat().st_mtime > ABANDONED:
            _remove(orphan)
    new = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"  # also of /, to be refused
    try:
        with naming(path):
            yield new
            if not new.exists():
                return
            for file in [new, *new.rglob("*")] if new.is_dir() else [new]:
                flush(file)
            try:
                os.replace(new, path)
            except OSError:
                if not (new.is_dir() and path.is_dir()):
                    raise
            flush(path.parent)
    finally:
        _remove(new)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing say which file it is, because the disk's own often do not.

    Raises:
        UserError: the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of what was being written, not of the disk
            raise
        raise UserError(f"{shown(path)} cannot be written: {error.strerror}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all."""
    raw = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
    with replacing(path) as new:
        new.write_bytes(raw)


def fill_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder of the cache and fill it, whole or not at all."""
    with replacing(target) as new:
        try:
            new.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"the cache folder {target.parent} cannot be written ({error.strerror}): "
                "give data.cache_dir=FOLDER"
            ) from error
        fill(new)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object, whole or not at all; null in the place of numbers that JSON has not."""
    standard = json.loads(json.dumps(values), parse_constant=lambda infinity: None)
    write_whole(path, json.dumps(standard, indent=2) + "\n")


def read_bytes(path: Path, most: int) -> bytes:
    """A file of at most so many bytes.

    Raises:
        UserError: it is larger.
    """
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise UserError(f"{path} is larger than {most:,} bytes, which no run writes")
    return raw


def parse_json(raw: bytes, finite: bool = True) -> Any:
    """As `json.loads`; a number that is not finite is None, as `write_json` writes it.

    An integer that no 64 bits hold is a float, whose digits have an end. Of many empty objects each
    would take fifty times its bytes of memory.

    Args:
        raw: in UTF-8.
        finite: false keeps inf and nan.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_PARTS:
        raise ValueError("it has too many parts")

    def known(text: str) -> float | None:
        return value if math.isfinite(value := float(text)) or not finite else None

    others: Any = dict.fromkeys(("parse_float", "parse_constant"), known)
    return json.loads(raw, parse_int=lambda x: int(x) if len(x) < 20 else known(x), **others)


def read_json(path: Path, shape: Any = dict, required: bool = False) -> dict[str, Any]:
    """The object in a file; {} where there is no file.

    Args:
        path: of the file.
        shape: what must be in it: a type, an object of shapes, or a pair of what it is if it is no
            object and if it is one; {"a": int, "b": {str: list}} has an integer a, and b, an
            object of lists. What else is there may be anything.
        required: that there is a file.

    Raises:
        UserError: it is damaged, holds something else, or is `required` and not there.
    """
    if not path.is_file():
        if not required:
            return {}
        raise UserError(f"no {path.name} in {path.parent}, so it is not a whole run")
    try:
        values: dict[str, Any] = parse_json(read_bytes(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    check_shape(values, shape, path)
    return values


def check_shape(value: Any, shape: Any, path: Path, name: str = "") -> None:
    """Raises `UserError` where what a file holds has not the shape, see `read_json`."""
    if isinstance(shape, tuple):
        shape = shape[isinstance(value, dict)]
    if isinstance(shape, dict) and isinstance(value, dict):
        for key in value if str in shape else shape:
            check_shape(value.get(key), shape.get(str, shape.get(key)), path, f"{name}.{key}")
    elif isinstance(shape, dict) or not isinstance(value, shape):
        raise UserError(f"{path} is damaged: {plain(name[1:]) or 'it'} is not what a run writes")
