"""Text → token ids → streams and windows. Knows no model and no config file."""

from mogrifier_lm.data.batching import IGNORE, ORDERS, ReadHeads, Streams
from mogrifier_lm.data.corpus import SPLITS, Corpus, Split, load_corpus, split_lines
from mogrifier_lm.data.tokenizer import EOS, UNK, SentencePieceTokenizer, Tokenizer, WordTokenizer

__all__ = [
    "EOS",
    "IGNORE",
    "ORDERS",
    "ReadHeads",
    "SPLITS",
    "UNK",
    "Corpus",
    "SentencePieceTokenizer",
    "Split",
    "Streams",
    "Tokenizer",
    "WordTokenizer",
    "load_corpus",
    "split_lines",
]
