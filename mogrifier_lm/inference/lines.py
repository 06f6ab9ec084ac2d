"""Texts that a trained model reads: lines of a file, of stdin, or of a column of a table."""

import csv
import gzip
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from mogrifier_lm.data import Tokenizer
from mogrifier_lm.data.source import Part
from mogrifier_lm.data.text import Reader
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import replacing
from mogrifier_lm.options import DataConfig

log = logging.getLogger(__name__)


class Line(NamedTuple):
    """A line of text, and the item of an experiment that it belongs to."""

    text: str
    item: str = ""


def checked(line: str, name: str) -> str:
    """The line itself, if it is one, of characters.

    Raises:
        UserError: it holds a line break, or bytes that were not UTF-8.
    """
    if "\n" in line:
        raise UserError(f"{name} holds a line break: give its lines singly")
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8: {line!r}") from error
    return line


@contextmanager
def opened(path: str, mode: str) -> Iterator[TextIO]:
    """A text file, packed where its name ends in .gz; - is stdin or stdout.

    A file is written whole or not at all.

    Raises:
        UserError: it cannot be read or written, or is no UTF-8 text.
    """
    if path == "-":
        yield sys.stdin if mode == "rt" else sys.stdout
        return
    opener: Any = gzip.open if path.endswith(".gz") else open
    newline = None if mode == "rt" else "\n"  # every end of a line that is read is one
    there = mode == "rt" or (Path(path).exists() and not Path(path).is_file())  # a device, say
    try:
        with (
            nullcontext(path) if there else replacing(Path(path)) as name,
            opener(name, mode, encoding="utf-8", newline=newline) as file,
        ):
            yield cast(TextIO, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        doing = "read" if mode == "rt" else "written"
        raise UserError(f"{path} cannot be {doing}: {reason}") from error


def read_lines(chunks: Iterable[bytes], name: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The lines of a text to be scored, read as a corpus is; what the model knows stays a word.

    Args:
        chunks: the bytes of the text.
        name: what errors call it.
        tokenizer: of the model.

    Raises:
        UserError: bytes that are not UTF-8, or an <eos> that ends no line.
    """
    unit = "word" if tokenizer.unit == "word" else "character"
    reader, rest = Reader(DataConfig(), unit, tokenizer.form, known=tokenizer.index), ""
    for block in reader.blocks(chunks, name):
        *lines, rest = (rest + block.decode()).split("\n")
        yield from lines
    if rest:
        yield rest
    for note in reader.notes():
        log.warning("%s: %s", name, note)


def read_tsv(file: Iterable[str], text: str, item: str, path: str) -> Iterator[Line]:
    """The lines in the columns of a table with a header, one a row."""
    rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not rows.fieldnames:
        raise UserError(f"{path} is empty")
    for column in filter(None, (text, item)):
        if column not in (rows.fieldnames or ()):
            known = ", ".join(rows.fieldnames or ())
            raise UserError(f"{path} has no column {column}, its columns are {known}")
    for row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path}, line {rows.line_num}: a row has not the cells of the header")
        yield Line(row[text], row[item] if item else "")


def lines_of(path: str, tokenizer: Tokenizer, column: str = "", item: str = "") -> Iterator[Line]:
    """The lines of a file, or with `column` those of a table; - is stdin, read as it comes."""
    if column:
        items: deque[str] = deque()

        def cells() -> Iterator[bytes]:
            for line in read_tsv((row.rstrip("\n") for row in source), column, item, path):
                items.append(line.item)
                yield f"{line.text}\n".encode()

        with opened(path, "rt") as source:
            for text in read_lines(cells(), path, tokenizer):
                yield Line(text, items.popleft())
        return
    if path == "-":
        chunks = iter(lambda: cast(BufferedReader, sys.stdin.buffer).read1(1 << 16), b"")
    else:
        chunks = Part(Path(path)).chunks()
    yield from map(Line, read_lines(chunks, path, tokenizer))
