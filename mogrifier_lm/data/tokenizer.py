"""Tokenizers: lines of text ↔ token ids."""

import abc
import functools
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json

EOS = "<eos>"
UNK = "<unk>"


class Tokenizer(abc.ABC):
    """Words are split at white space and become one or more tokens each; one <eos> ends every
    line, blank lines too.

    Args:
        vocabulary: [V] what each token is called, position = id; holds <eos>.
        spellings: [V] its bytes in a text: a token that begins a word begins with a space.
    """

    def __init__(self, vocabulary: Sequence[str], spellings: Iterable[bytes]) -> None:
        self.vocabulary = list(vocabulary)
        self.index = {name: i for i, name in enumerate(self.vocabulary)}
        self.eos_id = self.index[EOS]
        self.spellings = list(spellings)
        self.spellings[self.eos_id] = b"\n"
        # [V] bool: the token begins a word; <eos> is a word.
        self.starts = np.array([s.startswith((b" ", b"\n")) for s in self.spellings])

    def __len__(self) -> int:
        return len(self.vocabulary)

    @abc.abstractmethod
    def word_ids(self, word: str) -> tuple[int, ...]:
        """The ids of one word of the text."""

    def encode(self, lines: Iterable[str]) -> np.ndarray:
        """Flat ids [N] of the lines, one <eos> after each; uint16 where the vocabulary fits."""
        word_ids, eos = functools.cache(self.word_ids), (self.eos_id,)
        ids = chain.from_iterable(chain(*map(word_ids, line.split()), eos) for line in lines)
        return np.fromiter(ids, dtype=np.uint16 if len(self) <= 1 << 16 else np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: single spaces between words, a line break for each <eos>."""
        text = b"".join(self.spellings[i] for i in ids).decode(errors="replace")
        return text.replace("\n ", "\n").removeprefix(" ")

    def decode_words(self, ids: Iterable[int]) -> list[str]:
        """The words that the ids spell, <eos> among them: one for each true `starts[ids]`."""
        return self.decode(ids).replace("\n", f" {EOS} ").split()

    @abc.abstractmethod
    def save(self, path: Path) -> None:
        """Write the file that `load_tokenizer` reads."""


class WordTokenizer(Tokenizer):
    """A word a token.

    Ids are ordered by falling frequency in the training text, ties by spelling. Words that the
    training text lacks become <unk>, which is in the vocabulary only where the training text holds
    it or an evaluation text needs it.

    Args:
        vocabulary: the types, position = id; holds <eos>.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__(vocabulary, (f" {word}".encode() for word in vocabulary))

    @classmethod
    def train(cls, train: Sequence[str], others: Iterable[str]) -> Self:
        """The vocabulary of the training lines; `others` only decide whether <unk> is needed."""
        counts = Counter(chain.from_iterable(map(str.split, train)))
        counts[EOS] = len(train)
        if UNK not in counts and any(w not in counts for line in others for w in line.split()):
            counts[UNK] = 0
        return cls([w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))])

    def word_ids(self, word: str) -> tuple[int, ...]:
        found = self.index.get(word, self.index.get(UNK))
        if found is None:
            raise UserError(f"{word!r} is not in the vocabulary, which has no {UNK} for it")
        return (found,)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"name": "word", "words": self.vocabulary}, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(read_json(path)["words"])


class SentencePieceTokenizer(Tokenizer):
    """Subwords (Kudo and Richardson, 2018) inside words, from which the text can be had back.

    No token spans words, so the sum of -ln p over a word's tokens is the word's, and perplexity per
    original word is comparable with a word model's (an upper bound: one segmentation is scored).
    <unk> in the text is one token, predicted like a word. Characters that the training text lacks,
    or nearly, are spelled in bytes.

    Args:
        model: a serialized SentencePiece model, as `train` makes.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor  # a word model does not need it

        self.model = model
        self.pieces = SentencePieceProcessor(model_proto=model)
        names = [self.pieces.id_to_piece(i) for i in range(len(self.pieces))]
        spellings = [
            bytes([int(name[3:5], 16)])
            if self.pieces.is_byte(i)
            else (f" {UNK}" if name == UNK else name.replace("▁", " ")).encode()
            for i, name in enumerate(names)
        ]
        super().__init__(names, spellings)

    @classmethod
    def train(
        cls,
        train: Iterable[str],
        others: Iterable[str] = (),
        *,
        model_type: str = "unigram",
        vocab_size: int = 5000,
    ) -> Self:
        """A model of the training lines; the same text and settings give the same bytes.

        Args:
            train: lines.
            others: not looked at.
            model_type: "unigram" or "bpe".
            vocab_size: tokens; 256 bytes, <eos>, <unk> and one that is never used among them.

        Raises:
            UserError: a vocabulary that the text cannot fill, or that cannot hold its characters.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        words = ((word for word in line.split() if word != UNK) for line in train)
        try:
            SentencePieceTrainer.train(
                sentence_iterator=filter(None, map(" ".join, words)),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                unk_piece="<never>",
                user_defined_symbols=[UNK],
                bos_id=-1,
                eos_piece=EOS,
                max_sentence_length=1 << 30,  # by default longer lines, of 4 kB, are left out
                num_threads=1,  # the number of threads changes the model
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2]
            raise UserError(f"tokenizer.vocab_size={vocab_size}: {reason}") from error
        return cls(model.getvalue())

    def word_ids(self, word: str) -> tuple[int, ...]:
        if word == UNK:
            return (self.index[UNK],)
        ids, spelling = self.pieces.encode(word), f" {word}".encode()
        if b"".join(self.spellings[i] for i in ids) != spelling:  # it holds ▁ or <unk>
            ids = [self.index["▁"], *(self.index[f"<0x{byte:02X}>"] for byte in word.encode())]
        return tuple(ids)

    def save(self, path: Path) -> None:
        path.with_suffix(".model").write_bytes(self.model)
        path.write_text(json.dumps({"name": "sentencepiece"}))

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(path.with_suffix(".model").read_bytes())


TOKENIZERS: dict[str, type[WordTokenizer] | type[SentencePieceTokenizer]] = {
    "word": WordTokenizer,
    "sentencepiece": SentencePieceTokenizer,
}


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    try:
        return TOKENIZERS[read_json(path, required=True)["name"]].load(path)
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer: {error.filename} is missing") from error
    except (KeyError, RuntimeError) as error:  # RuntimeError is sentencepiece's
        raise UserError(f"the tokenizer {path} is damaged: {error}") from error
