"""Text → token ids → streams and windows. Stands alone: knows no model and no config file."""

from mogrifier_lm.data.batching import IGNORE, ReadHeads, Streams
from mogrifier_lm.data.corpus import SPLITS, Corpus, Source, Split, load_corpus, split_lines
from mogrifier_lm.data.tokenizer import EOS, UNK, SentencePieceTokenizer, Tokenizer, WordTokenizer

__all__ = [
    "EOS",
    "IGNORE",
    "ReadHeads",
    "SPLITS",
    "UNK",
    "Corpus",
    "SentencePieceTokenizer",
    "Source",
    "Split",
    "Streams",
    "Tokenizer",
    "WordTokenizer",
    "load_corpus",
    "split_lines",
]
