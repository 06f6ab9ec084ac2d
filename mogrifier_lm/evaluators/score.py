"""What every evaluator returns: sums, divided once."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """Totals over a split: -ln p in nats, tokens predicted, original words and bytes of text."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def ppl(self) -> float:
        """Perplexity per original word, one <eos> a line counted; inf where it overflows."""
        mean = self.nats / self.words
        return math.exp(mean) if mean < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The entry of summary.json: perplexity per word, then per token, and bits per byte."""
        return {
            "ppl": self.ppl,
            "token_ppl": math.exp(min(self.nats / self.tokens, 700)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "nats": self.nats,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }
