"""Text → token ids → streams and windows. Knows no model and no config file."""

from mogrifier_lm.data.batching import IGNORE, ORDERS, ReadHeads, Streams
from mogrifier_lm.data.corpus import Corpus, Split, load_corpus
from mogrifier_lm.data.source import SPLITS
from mogrifier_lm.data.subwords import TOKENIZERS, SentencePieceTokenizer, load_tokenizer
from mogrifier_lm.data.text import EOS, UNK
from mogrifier_lm.data.tokenizer import Tokenizer, WordTokenizer

__all__ = [
    "EOS",
    "IGNORE",
    "ORDERS",
    "ReadHeads",
    "SPLITS",
    "TOKENIZERS",
    "UNK",
    "Corpus",
    "SentencePieceTokenizer",
    "Split",
    "Streams",
    "Tokenizer",
    "WordTokenizer",
    "load_corpus",
    "load_tokenizer",
]
