"""What each word of a text costs a trained model.

Shape legend: T time steps, B texts side by side, N tokens, V vocabulary.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby, islice
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from mogrifier_lm.data import EOS, IGNORE, UNK, Tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.captured import encode
from mogrifier_lm.evaluators.score import perplexity
from mogrifier_lm.inference.adapt import Adaptation
from mogrifier_lm.inference.lines import Line, checked
from mogrifier_lm.model import LanguageModel, States
from mogrifier_lm.terminal import plain

WINDOW = 512  # time steps at once, those of the static evaluator
LOGITS = 1 << 20  # looked at at once
GROUPS, BATCH = 1024, 4096  # texts that are sorted by length, and tokens of a batch of them
UNITS = ("line", "text", "item")
EDGES = ("right", "left")


@dataclass(frozen=True, slots=True)
class Word:
    """A word and what it costs, given all before it in its unit; a row of a table.

    item: of its line; "" where there are none.
    sentence: its line, from 1.
    position: in its line, from 1; <eos> is the last.
    word: as it stands in the text.
    surprisal: -log2 p, bits.
    nats: -ln p.
    unk: the model does not know it, and this is the cost of <unk>.
    count: in the training text; None where that is not known.
    entropy: of the distribution that predicts it, bits. Here and in rank a word in pieces is its
        first.
    rank: among all types in that distribution, 1 is the likeliest.
    guesses: the likeliest types.
    """

    item: str
    sentence: int
    position: int
    word: str
    surprisal: float
    nats: float
    unk: bool
    count: int | None
    entropy: float
    rank: int
    guesses: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COLUMNS}


COLUMNS = tuple(f.name for f in fields(Word))


@dataclass
class Totals:
    """Of the words that went by."""

    words: int = 0
    ends: int = 0  # <eos> among them
    nats: float = 0.0
    unknown: int = 0
    unknown_nats: float = 0.0

    def watch(self, words: Iterable[Word]) -> Iterator[Word]:
        for word in words:
            self.words, self.nats = self.words + 1, self.nats + word.nats
            self.ends += word.word == EOS
            if word.unk:
                self.unknown += 1
                self.unknown_nats += word.nats
            yield word

    @property
    def ppl(self) -> float:
        """Perplexity per word."""
        return perplexity(self.nats / self.words)

    def __str__(self) -> str:
        """Perplexity with and without what was scored as <unk>, which is cheap to predict."""
        if not self.words:
            return "no words"
        line = f"{self.words:,} words, {self.nats:.4f} nats, "
        line += f"perplexity {self.ppl:.2f} a word"
        if self.unknown and self.unknown == self.words - self.ends:
            line += f" (warning: all scored as {UNK}, the model knows none of the words, and these "
            line += "figures say nothing of the text)"
        elif self.unknown:
            share, rest = self.unknown / self.words, self.words - self.unknown
            known = perplexity((self.nats - self.unknown_nats) / rest) if rest else math.inf
            line += f"; {self.unknown:,} ({share:.1%}) scored as {UNK}, {known:.2f} without them"
            if share > 0.05:
                line += f" (warning: with so many {UNK} these figures say little of the text)"
        return line


@dataclass
class Scores:
    """The scored words of a text, in its order."""

    words: list[Word]
    totals: Totals = field(default_factory=Totals)

    def __iter__(self) -> Iterator[Word]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a column for each field of `Word`."""
        import pandas as pd

        columns = {name: [getattr(word, name) for word in self.words] for name in COLUMNS}
        return pd.DataFrame(columns).astype({"count": "Int64"})


def write_tsv(words: Iterable[Word], file: TextIO, guesses: bool = False) -> None:
    """Tab-separated, with a header; pandas reads it with sep="\\t", keep_default_na=False."""
    columns = COLUMNS if guesses else COLUMNS[:-1]
    for i, word in enumerate(words):
        if i == 0:  # no head where there is no body, because there is no such text, say
            file.write("\t".join(columns) + "\n")
        file.write("\t".join(_cell(getattr(word, name)) for name in columns) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return plain(" ".join(value))
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6f}" if isinstance(value, float) else plain(str(value))


@dataclass
class _Part:
    """A line on its way: its tokens, and for each what `_Scorer.measure` finds."""

    line: Line
    number: int
    ids: np.ndarray
    found: list[np.ndarray] = field(default_factory=list)


def _part(tokenizer: Tokenizer, number: int, line: Line) -> _Part:
    text = checked(line.text, f"sentence {number}")
    return _Part(line, number, tokenizer.encode([text]).astype(np.int64))


class _Scorer:
    """Runs a model over texts and keeps what is known of each token."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        edge: str,
        top: int,
        adaptation: Adaptation | None,
    ) -> None:
        self.model, self.tokenizer, self.top = model, tokenizer, top
        self.adaptation = adaptation
        device = model.output_bias.device
        self.in_pieces = not tokenizer.starts.all()
        self.starts = torch.from_numpy(tokenizer.starts).to(device)
        self.at_edge = self.in_pieces and edge == "right"

    def measure(self, hidden_NE: Tensor, targets_N: Tensor) -> np.ndarray:
        """[N, 4 + top]: nats, entropy in bits, rank, nats of a word's beginning, guesses."""
        table = hidden_NE.new_zeros(len(hidden_NE), 4 + self.top, dtype=torch.float64)
        table[:, 0] = self.model.output_nats(hidden_NE, targets_N)  # the evaluators' own
        # So many rows at once as stay in a cache: half the time of a whole batch of them.
        size = max(1, LOGITS // self.model.vocab_size)
        for found, hidden, targets in zip(
            *(torch.split(t, size) for t in (table, hidden_NE, targets_N)), strict=True
        ):
            log_p = self.model.log_probs(hidden)
            own = log_p.gather(1, targets[:, None])
            found[:, 2] = (log_p > own).sum(1) + 1
            if self.at_edge:
                found[:, 3] = -log_p[:, self.starts].logsumexp(1)
            if self.top:
                found[:, 4:] = log_p.topk(self.top, 1).indices
            plogp = log_p.exp().mul_(log_p).nan_to_num_(0.0)
            found[:, 1] = plogp.sum(1) / -math.log(2)
        return table.cpu().numpy()

    def together(self, texts: Sequence[Sequence[_Part]]) -> None:
        """Score several texts side by side, each from a state of its own."""
        sizes = [sum(len(part.ids) for part in text) for text in texts]
        ids_TB = np.full((max(sizes), len(texts)), IGNORE, dtype=np.int64)
        for b, text in enumerate(texts):
            ids_TB[: sizes[b], b] = np.concatenate([part.ids for part in text])
        inputs_TB = np.roll(np.where(ids_TB == IGNORE, self.tokenizer.eos_id, ids_TB), 1, 0)
        inputs_TB[0] = self.tokenizer.eos_id
        states, device = self.model.zero_states(len(texts)), self.model.output_bias.device
        tables: list[list[np.ndarray]] = [[] for _ in texts]
        for start in range(0, len(ids_TB), WINDOW):
            steps = slice(start, start + WINDOW)
            targets_TB = torch.from_numpy(ids_TB[steps]).to(device)
            hidden, states = encode(
                self.model, torch.from_numpy(inputs_TB[steps]).to(device), states
            )
            real_N = (targets_TB != IGNORE).flatten()
            found = self.measure(hidden[real_N], targets_TB.flatten()[real_N])
            streams_N = np.broadcast_to(np.arange(len(texts)), targets_TB.shape).flatten()
            streams_N = streams_N[real_N.cpu().numpy()]
            for b in range(len(texts)):
                tables[b].append(found[streams_N == b])
        for text, table in zip(texts, tables, strict=True):
            ends = np.cumsum([len(part.ids) for part in text])[:-1]
            for part, own in zip(text, np.split(np.concatenate(table), ends), strict=True):
                part.found = [own]

    def window(self, ids: Sequence[int], last: int, states: States) -> tuple[np.ndarray, States]:
        """What `measure` finds of some tokens that follow `last`; the states after them."""
        device = self.model.output_bias.device
        inputs_T1 = torch.tensor([last, *ids[:-1]], device=device)[:, None]
        targets_T = torch.tensor(ids, device=device)
        if self.adaptation is None:
            hidden, states = encode(self.model, inputs_T1, states)
            return self.measure(hidden, targets_T), states
        hidden, states = self.adaptation.encode(inputs_T1, targets_T[:, None], states)
        found = self.measure(hidden, targets_T)
        self.adaptation.learn()
        return found, states

    def carried(self, parts: Iterable[_Part]) -> Iterator[_Part]:
        """Score one long text, window by window; a line is done when all its tokens are."""
        size = self.adaptation.window if self.adaptation else WINDOW
        states, last = self.model.zero_states(1), self.tokenizer.eos_id
        waiting: deque[_Part] = deque()
        pending: list[int] = []
        source = iter(parts)
        while True:
            part = next(source, None)
            if part is not None:
                waiting.append(part)
                pending += part.ids.tolist()
            while len(pending) >= size or (part is None and pending):
                ids, pending = pending[:size], pending[size:]
                found, states = self.window(ids, last, states)
                last = ids[-1]
                for one in waiting:
                    missing = len(one.ids) - sum(map(len, one.found))
                    taken, found = found[:missing], found[missing:]
                    if missing:
                        one.found.append(taken)
                while waiting and sum(map(len, waiting[0].found)) == len(waiting[0].ids):
                    yield waiting.popleft()
            if part is None:
                return

    def words(self, part: _Part, counts: Mapping[str, int] | None) -> Iterator[Word]:
        """The words of a line that has been scored."""
        table, tokenizer, ids = np.concatenate(part.found), self.tokenizer, part.ids
        first = np.flatnonzero(tokenizer.starts[ids])
        nats = np.add.reduceat(table[:, 0], first)
        if self.at_edge:  # the cost of a word's end is its own, not the next one's
            beginning = np.concatenate([table[first, 3], [0.0]])
            beginning[0] = 0.0  # after an <eos> nothing but a word can come
            nats = nats + beginning[1:] - beginning[:-1]
        names = [*tokenizer.split(part.line.text), EOS]
        for i, (name, start) in enumerate(zip(names, first, strict=True)):
            unk = not self.in_pieces and tokenizer.vocabulary[ids[start]] == UNK
            yield Word(
                item=part.line.item,
                sentence=part.number,
                position=i + 1,
                word=name,
                surprisal=float(nats[i]) / math.log(2),
                nats=float(nats[i]),
                unk=unk,
                count=None if counts is None else counts.get(name, 0),
                entropy=float(table[start, 1]),
                rank=int(table[start, 2]),
                guesses=tuple(tokenizer.vocabulary[int(k)] for k in table[start, 4:]),
            )


def score_lines(
    model: LanguageModel,
    tokenizer: Tokenizer,
    lines: Iterable[Line],
    unit: str = "line",
    edge: str = "right",
    top: int = 0,
    counts: Mapping[str, int] | None = None,
    adaptation: Adaptation | None = None,
) -> Iterator[Word]:
    """Each word of a text, as a stream; every line ends with an <eos>, which is a word.

    Args:
        model: with trained weights.
        tokenizer: its.
        lines: of the text.
        unit: what is scored from a state of zeros: each "line", the whole "text", or the lines in
            a row that are of one "item".
        edge: where a word in pieces ends. "right": with the decision that no further piece follows
            (Pimentel and Meister, arXiv 2406.14561; Oh and Schuler, arXiv 2406.10851). "left": the
            bare sum over its pieces, which leaves that decision to the next word. Sums over a line
            are the same.
        top: how many guesses are listed.
        counts: of words in the training text.
        adaptation: by which the weights learn from what has been scored, over all of the text,
            whatever its unit; they are put back at the end.

    Raises:
        UserError: an unknown unit or edge; a word that the model has no token for.
    """
    for name, value, known in (("unit", unit, UNITS), ("edge", edge, EDGES)):
        if value not in known:
            raise UserError(f"{name} is {value!r}, it must be one of {', '.join(known)}")
    if top < 0:
        raise UserError(f"top is {top}, it must be at least 0")
    scorer = _Scorer(model, tokenizer, edge, min(top, model.vocab_size), adaptation)
    parts = itertools.starmap(partial(_part, tokenizer), enumerate(lines, start=1))
    by = {"line": lambda part: part.number, "text": lambda part: 0, "item": lambda p: p.line.item}
    own = (group for _, group in groupby(parts, by[unit]))
    if unit == "text" or adaptation:
        with adaptation.begun() if adaptation else nullcontext():
            for group in own:
                for part in scorer.carried(group):
                    yield from scorer.words(part, counts)
        return
    source = map(list, own)
    while some := list(islice(source, GROUPS)):
        by_length = sorted(some, key=lambda text: sum(len(part.ids) for part in text))
        batch: list[list[_Part]] = []
        for text in [*by_length, []]:
            longest = sum(len(part.ids) for part in text)
            if batch and (not text or longest * (len(batch) + 1) > BATCH):
                scorer.together(batch)
                batch = []
            if text:
                batch.append(text)
        for text in some:
            for part in text:
                yield from scorer.words(part, counts)
