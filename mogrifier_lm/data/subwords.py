"""Subwords, and the tokenizers by name."""

import functools
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np

from mogrifier_lm.data.text import EOS, PLAIN, UNK, Form
from mogrifier_lm.data.tokenizer import (
    Blocks,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
)
from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.files import MAX_JSON, read_bytes, read_json, write_whole


class SentencePieceTokenizer(Tokenizer):
    """Subwords (Kudo and Richardson, 2018) inside words, from which the text can be had back.

    No token spans words, so the sum of -ln p over a word's tokens is the word's, and perplexity per
    original word is comparable with a word model's (an upper bound: one segmentation is scored).
    <unk> in the text is one token, predicted like a word. Characters that the training text lacks,
    or nearly, are spelled in bytes.

    Args:
        model: a serialized SentencePiece model, as `train` makes.
        form: that text is brought to.
    """

    name, settings = "sentencepiece", ("model_type", "vocab_size")

    def __init__(self, model: bytes, form: Form = PLAIN) -> None:
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
        super().__init__(names, spellings, form)
        self._cut = functools.lru_cache(1 << 18)(self._cut_word)

    @classmethod
    def train(
        cls,
        train: Blocks,
        others: Blocks = (),
        *,
        form: Form = PLAIN,
        model_type: str = "unigram",
        vocab_size: int = 5000,
    ) -> Self:
        """A model of the training text; the same text and settings give the same bytes.

        Args:
            train: the text.
            others: not looked at.
            form: of the text.
            model_type: "unigram" or "bpe".
            vocab_size: tokens; 256 bytes, <eos>, <unk> and one that is never used among them.

        Raises:
            UserError: a vocabulary that the text cannot fill, or that cannot hold its characters.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_without_unknowns(train),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                unk_piece="<never>",
                user_defined_symbols=[UNK],
                required_chars="▁",  # else left out where spaces are rare
                bos_id=-1,
                eos_piece=EOS,
                max_sentence_length=1 << 30,  # by default longer lines, of 4 kB, are left out
                num_threads=1,  # the number of threads changes the model
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2]
            if most := re.search(r"to a value <= (\d+)", reason):
                reason = f"too many, the text gives {int(most[1]):,} pieces at most"
            elif least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
                reason = f"too few, the characters of the text and the 256 bytes are {least[1]}"
            raise UserError(f"tokenizer.vocab_size={vocab_size}: {reason}") from error
        return cls(model.getvalue(), form)

    def _cut_word(self, word: bytes) -> tuple[int, ...]:
        if word == UNK.encode():
            return (self.index[UNK],)
        ids = self.pieces.encode(word.decode())
        if b"".join(self.spellings[i] for i in ids) != b" " + word:  # it holds ▁ or <unk>
            ids = [self.index["▁"], *(self.index[f"<0x{byte:02X}>"] for byte in word)]
        return tuple(ids)

    def encode_block(self, text: bytes) -> np.ndarray:
        eos = (self.eos_id,)
        lines = text.split(b"\n")
        ids = [chain.from_iterable(map(self._cut, line.split())) for line in lines]
        return np.fromiter(chain(ids[0], *(chain(eos, line) for line in ids[1:])), self.dtype)

    def save(self, path: Path) -> None:
        write_whole(path.with_suffix(".model"), self.model)
        super().save(path)

    def checksum(self, values: Mapping[str, Any]) -> int:
        return zlib.crc32(self.model, super().checksum(values))

    @classmethod
    def load(cls, path: Path, values: Mapping[str, Any], form: Form) -> Self:
        return cls(read_bytes(path.with_suffix(".model"), MAX_JSON), form)


def _without_unknowns(blocks: Blocks) -> Iterator[str]:
    """The lines of a text that hold a word, without <unk>."""
    for block in blocks:
        for line in block.split(b"\n"):
            if words := [word for word in line.split() if word != UNK.encode()]:
                yield b" ".join(words).decode()


TOKENIZERS: dict[str, type[WordTokenizer | ByteTokenizer | SentencePieceTokenizer]] = {
    "word": WordTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "char": CharTokenizer,
    "byte": ByteTokenizer,
}


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    values = read_json(path, required=True)
    try:
        form, crc = Form(**values.get("form", {})), values.pop("crc32", None)
        tokenizer = TOKENIZERS[values["name"]].load(path, values, form)
        if crc not in (None, tokenizer.checksum(values)):  # an older file has none
            raise ValueError("its checksum is another one")
        return tokenizer
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer: {error.filename} is missing") from error
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer {path} is damaged: {one_line(error)}") from error
