"""What every evaluator returns: sums, divided once."""

import math
from dataclasses import dataclass
from typing import Any

from mogrifier_lm.options import LONG_WORD


def perplexity(mean_nats: float) -> float:
    """exp; inf where it overflows or nothing finite was predicted."""
    return math.exp(mean_nats) if mean_nats < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Score:
    """Totals over a split: -ln p in nats, tokens predicted, words, bytes, characters of text."""

    nats: float
    tokens: int
    words: int
    bytes: int
    characters: int = 0  # not known

    @property
    def words_are_units(self) -> bool:
        """False where each token is a character, or white space does not part the words."""
        return self.tokens != self.characters and self.characters <= LONG_WORD * self.words

    @property
    def ppl(self) -> float:
        """Perplexity per original word, one <eos> a line counted."""
        return perplexity(self.nats / self.words)

    @property
    def unit_ppl(self) -> float:
        """What training is steered by: perplexity per word, or per token where that says more."""
        return self.ppl if self.words_are_units else perplexity(self.nats / self.tokens)

    def __str__(self) -> str:
        if self.words_are_units:
            return f"perplexity {self.ppl:.2f}"
        return f"{self.nats / math.log(2) / self.characters:.4f} bits per character"

    def to_dict(self) -> dict[str, Any]:
        """The entry of summary.json: perplexity per word and per token, bits per byte, totals.

        Where words are no unit there are also bits per character.
        """
        bits, known = self.nats / math.log(2), {}
        if not self.words_are_units:
            known = {"bits_per_character": bits / self.characters, "characters": self.characters}
        return {
            "ppl": self.ppl,
            "token_ppl": perplexity(self.nats / self.tokens),
            "bits_per_byte": bits / self.bytes,
            "nats": self.nats,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            **known,
        }
