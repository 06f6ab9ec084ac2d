"""Tokenizers: lines of text ↔ token ids."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

EOS = "<eos>"
UNK = "<unk>"


class WordTokenizer:
    """A word a token, split at white space; one <eos> ends every line, blank lines too.

    Ids are ordered by falling frequency in the training text, ties by spelling. Words that the
    training text lacks become <unk>, which is in the vocabulary only where the training text holds
    it or an evaluation text needs it.

    Args:
        words: the vocabulary, position = id; holds <eos>.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}
        self.eos_id = self.index[EOS]

    @classmethod
    def train(cls, train: Iterable[str], others: Iterable[str]) -> Self:
        """The vocabulary of the training lines; `others` only decide whether <unk> is needed."""
        counts: Counter[str] = Counter()
        num_lines = 0
        for line in train:
            counts.update(line.split())
            num_lines += 1
        counts[EOS] = num_lines
        if UNK not in counts and any(w not in counts for line in others for w in line.split()):
            counts[UNK] = 0
        return cls([w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, lines: Iterable[str]) -> np.ndarray:
        """Flat ids [N] of the lines, one <eos> after each; uint16 where the vocabulary fits."""
        eos, index, unk = (self.eos_id,), self.index, self.index.get(UNK, -1)
        ids = itertools.chain.from_iterable(
            itertools.chain((index.get(word, unk) for word in line.split()), eos) for line in lines
        )
        return np.fromiter(ids, dtype=np.uint16 if len(self) <= 1 << 16 else np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, a line break for each <eos>."""
        words = (self.words[i] for i in ids)
        return " ".join("\n" if w == EOS else w for w in words).replace(" \n ", "\n")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"name": "word", "words": self.words}, ensure_ascii=False))

    @classmethod
    def load(cls, values: dict[str, Any]) -> Self:
        return cls(values["words"])


TOKENIZERS = {"word": WordTokenizer}


def load_tokenizer(path: Path) -> WordTokenizer:
    """The tokenizer saved at `path`."""
    values = json.loads(path.read_text())
    return TOKENIZERS[values["name"]].load(values)
