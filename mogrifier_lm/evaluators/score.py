"""What every evaluator returns: sums, divided once."""

import math
from dataclasses import dataclass
from typing import Any


def perplexity(mean_nats: float) -> float:
    """exp; inf where it overflows or nothing finite was predicted."""
    return math.exp(mean_nats) if mean_nats < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Score:
    """Totals over a split: -ln p in nats, tokens predicted, original words and bytes of text."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def ppl(self) -> float:
        """Perplexity per original word, one <eos> a line counted."""
        return perplexity(self.nats / self.words)

    def to_dict(self) -> dict[str, Any]:
        """The entry of summary.json: perplexity per word, then per token, and bits per byte."""
        return {
            "ppl": self.ppl,
            "token_ppl": perplexity(self.nats / self.tokens),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "nats": self.nats,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }
