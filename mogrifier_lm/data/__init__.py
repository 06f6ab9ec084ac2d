"""Text → token ids → streams and windows. Stands alone: knows no model and no config file."""

from mogrifier_lm.data.batching import IGNORE, ReadHeads, Streams
from mogrifier_lm.data.corpus import SPLITS, Corpus, Source, Split, load_corpus
from mogrifier_lm.data.tokenizer import EOS, UNK, WordTokenizer

__all__ = [
    "EOS",
    "IGNORE",
    "ReadHeads",
    "SPLITS",
    "UNK",
    "Corpus",
    "Source",
    "Split",
    "Streams",
    "WordTokenizer",
    "load_corpus",
]
