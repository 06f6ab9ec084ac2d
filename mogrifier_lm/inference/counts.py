"""How often each word occurs in the training text of a model."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from mogrifier_lm.data import Tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import read_json, write_whole
from mogrifier_lm.runs.build import saved_corpus
from mogrifier_lm.runs.folder import RunFolder

log = logging.getLogger(__name__)


def training_counts(tokenizer: Tokenizer, ids: np.ndarray) -> Mapping[str, int]:
    """Word → its occurrences among the tokens of a text, <eos> among the words."""
    if tokenizer.starts.all():
        found = np.bincount(ids, minlength=len(tokenizer)).tolist()
        return dict(zip(tokenizer.vocabulary, found, strict=True))
    starts = np.flatnonzero(tokenizer.starts[ids])
    counts: Counter[str] = Counter()
    for start, stop in pairwise([*starts[:: 1 << 20], len(ids)]):  # a million words at a time
        counts.update(tokenizer.decode_words(ids[start:stop]))
    return counts


def write_counts(folder: RunFolder, tokenizer: Tokenizer, counts: Mapping[str, int]) -> None:
    """A number for each type where types are words, else the words with their numbers."""
    values: Any = counts
    if tokenizer.starts.all():
        values = [counts[name] for name in tokenizer.vocabulary]
    write_whole(folder.counts, json.dumps({"counts": values}, ensure_ascii=False))


def read_counts(folder: RunFolder, tokenizer: Tokenizer) -> Mapping[str, int] | None:
    """Of an exported folder, or of a run whose training text is still there; else None."""
    values = read_json(folder.counts).get("counts")
    if isinstance(values, list) and len(values) == len(tokenizer):
        values = dict(zip(tokenizer.vocabulary, values, strict=True))
    if isinstance(values, dict) and all(isinstance(n, int) for n in values.values()):
        return values
    if values is not None:
        raise UserError(f"{folder.counts} is damaged: no number for each word")
    if not folder.provenance.is_file():
        return None
    try:
        return training_counts(tokenizer, saved_corpus(folder).splits["train"].ids)
    except (UserError, ImportError, OSError) as error:
        log.warning("the column count stays empty, without the training text: %s", error)
        return None
