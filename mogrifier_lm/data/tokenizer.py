"""Tokenizers: plain text ↔ token ids, of words, characters and bytes."""

import abc
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from mogrifier_lm.data.text import EOS, PLAIN, UNK, Form, words_of
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import write_whole

Blocks = Iterable[bytes]  # of UTF-8 text, in whole words, in which "\n" ends a line


class Tokenizer(abc.ABC):
    """Words are split at ASCII white space and become one or more tokens each; one <eos> ends
    every line, blank lines too.

    Args:
        vocabulary: [V] what each token is called, position = id; holds <eos>.
        spellings: [V] its bytes in a text: a token that begins a word begins with a space.
        form: that text is brought to.
    """

    name: str
    unit = "word"  # what a token is at most
    settings: tuple[str, ...] = ()  # of `train`

    def __init__(
        self, vocabulary: Sequence[str], spellings: Iterable[bytes], form: Form = PLAIN
    ) -> None:
        self.vocabulary, self.form = list(vocabulary), form
        self.index = {name: i for i, name in enumerate(self.vocabulary)}
        self.eos_id = self.index[EOS]
        self.spellings = list(spellings)
        self.spellings[self.eos_id] = b"\n"
        # [V] bool: the token begins a word, or is all that there is of one; <eos> is a word.
        whole = self.unit != "word"
        self.starts = np.array([whole or s.startswith((b" ", b"\n")) for s in self.spellings])

    def __len__(self) -> int:
        return len(self.vocabulary)

    @abc.abstractmethod
    def encode_block(self, text: bytes) -> np.ndarray:
        """Flat ids [N] of text in the tokenizer's form, in whole words."""

    def encode(self, lines: Iterable[str]) -> np.ndarray:
        """Flat ids [N] of the lines, one <eos> after each; uint16 where the vocabulary fits."""
        return self.encode_block(self.form("".join(f"{line}\n" for line in lines)).encode())

    def split(self, line: str) -> list[str]:
        """The words of a line, as `decode_words` gives those that are known."""
        return words_of(self.form(line))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: single spaces between words, a line break for each <eos>."""
        text = b"".join(self.spellings[i] for i in ids).decode(errors="replace")
        return text.replace("\n ", "\n").removeprefix(" ") if self.unit == "word" else text

    def decode_words(self, ids: Iterable[int]) -> list[str]:
        """The words that the ids spell, <eos> among them: one for each true `starts[ids]`."""
        if self.unit != "word":
            return [self.vocabulary[i] for i in ids]
        return words_of(self.decode(ids).replace("\n", f" {EOS} "))

    def save(self, path: Path) -> None:
        """Write the file that `load_tokenizer` reads."""
        values = {"name": self.name, **self._values()}
        values |= {"form": asdict(self.form)} if self.form != PLAIN else {}
        values["crc32"] = self.checksum(values)
        write_whole(path, json.dumps(values, ensure_ascii=False))

    def checksum(self, values: Mapping[str, Any]) -> int:
        """Of what the file holds, and of what lies beside it."""
        return zlib.crc32(json.dumps(values, sort_keys=True).encode())

    def _values(self) -> dict[str, Any]:
        """What the file holds beside the name, the checksum and the form."""
        return {}

    @classmethod
    @abc.abstractmethod
    def load(cls, path: Path, values: Mapping[str, Any], form: Form) -> Self:
        """The tokenizer of such a file, which holds `values`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of ids: uint16 where the vocabulary fits."""
        return np.dtype(np.uint16 if len(self) <= 1 << 16 else np.int32)


class _Lookup(dict[bytes, int]):
    """Word → id; any other word → `unk`, where there is one."""

    unk: int | None

    def __missing__(self, word: bytes) -> int:
        if self.unk is None:
            text = word.decode()
            raise UserError(f"{text!r} is not in the vocabulary, nor is {UNK}: add {UNK} to it")
        return self.unk


class WordTokenizer(Tokenizer):
    """A word a token.

    Ids are ordered by falling frequency in the training text, ties by spelling. Words that the
    training text lacks become <unk>, which is in the vocabulary only where the training text holds
    it, its rare words are read as it, or an evaluation text needs it.

    Args:
        vocabulary: the types, position = id; holds <eos>.
        form: that text is brought to.
    """

    name, settings = "word", ("min_count", "max_size")

    def __init__(self, vocabulary: Sequence[str], form: Form = PLAIN) -> None:
        super().__init__(vocabulary, map(self._spelling, vocabulary), form)
        self.ids = _Lookup((word.encode(), i) for i, word in enumerate(self.vocabulary))
        self.ids.unk = self.index.get(UNK)

    @staticmethod
    def _spelling(name: str) -> bytes:
        return f" {name}".encode()

    @staticmethod
    def _count(blocks: Blocks) -> Counter[str]:
        counts: Counter[bytes] = Counter()
        lines = 0
        for block in blocks:
            counts.update(block.split())
            lines += block.count(b"\n")
        return Counter({EOS: lines} | {word.decode(): n for word, n in counts.items()})

    @classmethod
    def train(
        cls,
        train: Blocks,
        others: Blocks = (),
        *,
        form: Form = PLAIN,
        min_count: int = 1,
        max_size: int | None = None,
    ) -> Self:
        """The vocabulary of the training text; `others` only decide whether <unk> is needed.

        Args:
            train: the text.
            others: further text.
            form: of both.
            min_count: rarer words are read as <unk>.
            max_size: of the vocabulary, <unk> and <eos> counted; what is rarer is <unk>.
        """
        counts = cls._count(train)
        eos, unk = counts.pop(EOS), counts.pop(UNK, None)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [item for item in ranked if item[1] >= min_count]
        needs_unk = unk is not None or len(kept) < len(ranked)
        if not needs_unk:
            needs_unk = not counts.keys() >= cls._count(others).keys() - {EOS}
        if max_size is not None and len(kept) + 1 + needs_unk > max_size:
            kept, needs_unk = kept[: max_size - 2], True
        unk = (unk or 0) + sum(n for _, n in ranked[len(kept) :])
        kept += [(EOS, eos), (UNK, unk)] if needs_unk else [(EOS, eos)]
        return cls([w for w, _ in sorted(kept, key=lambda item: (-item[1], item[0]))], form)

    def encode_block(self, text: bytes) -> np.ndarray:
        words = text.replace(b"\n", f" {EOS} ".encode()).split()
        return np.fromiter(map(self.ids.__getitem__, words), self.dtype, len(words))

    def _values(self) -> dict[str, Any]:
        return {"words": self.vocabulary}

    @classmethod
    def load(cls, path: Path, values: Mapping[str, Any], form: Form) -> Self:
        words = values["words"]
        if not isinstance(words, list) or len({str(word) for word in words}) < len(words):
            raise ValueError("its words are no list, or one is there twice")
        return cls(words, form)


class CharTokenizer(WordTokenizer):
    """A character a token, spaces too; <eos> is the end of a line, where the text has one.

    Args, order of the ids, settings of `train`: as of words.
    """

    name, unit = "char", "character"

    def __init__(self, vocabulary: Sequence[str], form: Form = PLAIN) -> None:
        super().__init__(vocabulary, form)
        # Code point → id, where that is a character of the vocabulary.
        self.table = np.full(0x110000, -1 if self.ids.unk is None else self.ids.unk, np.int32)
        for i, name in enumerate(self.vocabulary):
            if len(name) == 1:
                self.table[ord(name)] = i
        self.table[ord("\n")] = self.eos_id

    @staticmethod
    def _spelling(name: str) -> bytes:
        return name.encode()

    @staticmethod
    def _count(blocks: Blocks) -> Counter[str]:
        totals = np.zeros(0x110000, np.int64)
        for block in blocks:
            points, counts = np.unique(_code_points(block), return_counts=True)
            totals[points] += counts
        lines, totals[ord("\n")] = int(totals[ord("\n")]), 0
        return Counter({EOS: lines} | {chr(p): int(totals[p]) for p in np.flatnonzero(totals)})

    def encode_block(self, text: bytes) -> np.ndarray:
        points = _code_points(text)
        ids: np.ndarray = self.table[points]
        if (ids < 0).any():
            character = chr(points[ids.argmin()])
            raise UserError(
                f"{character!r} is not in the vocabulary, nor is {UNK}: add {UNK} to it"
            )
        return ids.astype(self.dtype)

    def split(self, line: str) -> list[str]:
        return list(self.form(line))


def _code_points(text: bytes) -> np.ndarray:
    return np.frombuffer(text.decode().encode("utf-32-le"), "<u4")


class ByteTokenizer(Tokenizer):
    """A byte a token, as the file has it; <eos> is the line feed, where the text has one."""

    name = unit = "byte"

    def __init__(self) -> None:
        names = [EOS if byte == 10 else f"<0x{byte:02X}>" for byte in range(256)]
        super().__init__(names, (bytes([byte]) for byte in range(256)))

    @classmethod
    def train(cls, train: Blocks, others: Blocks = (), *, form: Form = PLAIN) -> Self:
        """There is nothing to learn."""
        return cls()

    def encode_block(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(self.dtype)

    def split(self, line: str) -> list[str]:
        return self.decode_words(line.encode())

    @classmethod
    def load(cls, path: Path, values: Mapping[str, Any], form: Form) -> Self:
        return cls()
