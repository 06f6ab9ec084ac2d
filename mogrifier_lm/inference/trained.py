"""A trained model with its tokenizer: what `mogrifier_lm.load_model` returns."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogrifier_lm.data import UNK, Tokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.captured import encode
from mogrifier_lm.inference.adapt import Adaptation, adaptation
from mogrifier_lm.inference.counts import read_counts
from mogrifier_lm.inference.gates import Gates, gates
from mogrifier_lm.inference.generate import Sampling, sample
from mogrifier_lm.inference.hub import download
from mogrifier_lm.inference.lines import Line, checked, read_lines
from mogrifier_lm.inference.score import Scores, Word, score_lines
from mogrifier_lm.model import LanguageModel, States
from mogrifier_lm.runs.build import check_device, saved_model, saved_tokenizer
from mogrifier_lm.runs.folder import RunFolder

log = logging.getLogger(__name__)

MOST = 4096  # texts drawn side by side; more are asked for with other seeds


class TrainedModel(LanguageModel):
    """A language model that reads and writes text.

    Attributes:
        tokenizer: of its training text.
        folder: that it was loaded from.
    """

    tokenizer: Tokenizer
    folder: RunFolder

    @cached_property
    def counts(self) -> Mapping[str, int] | None:
        """Word → how often it occurs in the training text; None where that is not known."""
        return read_counts(self.folder, self.tokenizer)

    @cached_property
    def adaptation(self) -> Adaptation:
        """How its weights move in dynamic evaluation.

        Raises:
            UserError: neither statistics of its gradients nor its training text are there.
        """
        return adaptation(self.folder, self)

    def forward(self, ids_TB: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """ln p of every type after each of the ids [T, B]: [T, B, V], and the states after them.

        An <eos> (`tokenizer.eos_id`) stands before a text's first word; without states a text
        begins.
        """
        hidden, states = self.encode(ids_TB, states or self.zero_states(ids_TB.shape[1]))
        return self.log_probs(hidden).view(*ids_TB.shape, -1), states

    def score(
        self,
        text: str | Sequence[str],
        unit: str = "line",
        *,
        items: Sequence[str] | None = None,
        edge: str = "right",
        top: int = 0,
        adapt: bool = False,
    ) -> Scores:
        """What each word costs.

        Args:
            text: lines, or a string with line breaks.
            unit: "line", each alone; "text", the state carried; "item", carried over lines in a
                row with the same of `items`.
            items: of each line.
            edge: where a word in pieces ends, see `inference.score.score_lines`.
            top: how many of the likeliest words are listed beside each.
            adapt: the weights learn from each window after it has been scored (dynamic evaluation,
                at temperature 1), over all lines; the trained ones are back at the end.

        Raises:
            UserError: no text, or a value that cannot be.
        """
        if isinstance(text, str):
            text = list(read_lines([text.encode()], "the text", self.tokenizer))
        lines = list(text)
        if not lines:
            raise UserError("there is no text to score")
        if items is not None and len(items) != len(lines) or unit == "item" and items is None:
            raise UserError("give an item for each line")
        named = [Line(*pair) for pair in zip(lines, items or [""] * len(lines), strict=True)]
        scores = Scores([])
        scores.words += scores.totals.watch(
            self.words(named, unit, edge=edge, top=top, adapt=adapt)
        )
        return scores

    def words(
        self,
        lines: Iterable[Line],
        unit: str = "line",
        *,
        edge: str = "right",
        top: int = 0,
        adapt: bool = False,
    ) -> Iterator[Word]:
        """As `score`, as a stream of words out of one of lines."""
        moving = self.adaptation if adapt else None
        return score_lines(self, self.tokenizer, lines, unit, edge, top, self.counts, moving)

    def generate(
        self,
        prompt: str = "",
        *,
        number: int = 1,
        max_words: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        unk: bool = False,
        stop: bool = False,
        seed: int = 1,
    ) -> list[str]:
        """Texts that go on after a prompt, without it; each line break is an <eos>.

        Args:
            prompt: follows an <eos>.
            number: of texts, drawn side by side.
            max_words: of each, <eos> counted.
            temperature: divides the logits.
            top_k, top_p: only from the likeliest k, or those that together have probability p.
            unk: <unk> may be drawn.
            stop: at the first <eos>.
            seed: of the draws.

        Raises:
            UserError: a value outside its range.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        steps = self.stream(
            prompt, number=number, max_words=max_words, unk=unk, stop=stop, **options
        )
        texts: list[list[int]] = [[] for _ in range(number)]
        for drawn in steps:
            for text, token in zip(texts, drawn, strict=True):
                if token is not None:
                    text.append(token)
        return [self.tokenizer.decode(text) for text in texts]

    def stream(
        self,
        prompt: str = "",
        *,
        number: int = 1,
        max_words: int = 50,
        unk: bool = False,
        stop: bool = False,
        **options: float | int | None,
    ) -> Iterator[list[int | None]]:
        """As `generate`, the next id of each text as it is drawn; None where a text is done."""
        for name, value, most in (("number", number, MOST), ("max_words", max_words, 1 << 62)):
            if not 1 <= value <= most:
                raise UserError(f"{name} is {value}, it must be between 1 and {most:,}")
        banned = [] if unk or UNK not in self.tokenizer.index else [self.tokenizer.index[UNK]]
        how = Sampling(banned=banned, **options)  # type: ignore[arg-type]
        words, done = [0] * number, [False] * number
        for drawn in sample(self, self._ids(prompt), number, self.tokenizer.eos_id, how):
            found: list[int | None] = list(drawn)
            for i, token in enumerate(drawn):
                words[i] += int(self.tokenizer.starts[token])
                done[i] = done[i] or words[i] > max_words
                if done[i]:
                    found[i] = None
                done[i] = done[i] or stop and token == self.tokenizer.eos_id
                whole = bool(self.tokenizer.starts.all())
                done[i] = done[i] or whole and words[i] == max_words
            if any(token is not None for token in found):
                yield found
            if all(done):
                return

    def continued(self, prompt: str = "", number: int = 1, **options: Any) -> Iterator[list[str]]:
        """As `generate`, texts with their prompt before them, piece by piece as they grow.

        Yields:
            first the prompt, then what each text grows by.
        """
        lines = (self.tokenizer.split(line) for line in prompt.split("\n"))
        between = " " if self.tokenizer.unit == "word" else ""
        yield ["\n".join(between.join(words) for words in lines)] * number
        texts = [_Growing(self.tokenizer, self._ids(prompt)) for _ in range(number)]
        for drawn in self.stream(prompt, number=number, **options):
            yield [text.add(token) for text, token in zip(texts, drawn, strict=True)]

    def next_word(self, prompt: str = "", k: int = 10) -> list[tuple[str, float]]:
        """The k likeliest tokens after a prompt, and their probabilities."""
        ids = torch.tensor([self.tokenizer.eos_id, *self._ids(prompt)])[:, None]
        hidden, _ = encode(self, ids.to(self.output_bias.device), self.zero_states(1))
        top = self.log_probs(hidden[-1:])[0].exp().topk(min(k, self.vocab_size))
        names = (self.tokenizer.vocabulary[i] for i in top.indices.tolist())
        return list(zip(names, top.values.tolist(), strict=True))

    def gates(self, line: str) -> Gates:
        """What each round multiplies, for each word, layer and round."""
        return gates(self, self.tokenizer, checked(line, "the line"))

    def unknown(self, text: str) -> list[str]:
        """Its words that are read as <unk>."""
        unk = self.tokenizer.index.get(UNK)
        lines = text.split("\n")
        words = {w for line in lines for w in self.tokenizer.split(checked(line, "the text"))}
        ids = ((word, self.tokenizer.encode([word])) for word in sorted(words - {UNK}))
        return [word for word, found in ids if unk is not None and unk in found]

    def _ids(self, prompt: str) -> list[int]:
        """The last line of a prompt goes on."""
        lines = [checked(line, "the prompt") for line in prompt.split("\n")]
        ids: list[int] = self.tokenizer.encode(lines)[:-1].tolist()
        return ids


class _Growing:
    """The text of ids that come one by one, after others that are not shown."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.line = [tokenizer.eos_id, *before]  # ids since a line began
        self.shown = tokenizer.decode(self.line)

    def add(self, token: int | None) -> str:
        """What the text grows by; nothing while bytes of a character are missing."""
        if token is None:
            return ""
        self.line.append(token)
        text = self.tokenizer.decode(self.line)
        if text.endswith("\ufffd"):
            return ""
        grown, self.shown = text[len(self.shown) :], text
        if token == self.tokenizer.eos_id:
            self.line, self.shown = [token], self.tokenizer.decode([token])
        return grown


def load_model(source: str | Path, device: str = "auto") -> TrainedModel:
    """A trained model, in evaluation mode, with its tokenizer; nothing of it is executed.

    Args:
        source: the folder of a run (its best weights by validation perplexity), an exported folder,
            or the name of one on the Hugging Face hub, "owner/name".
        device: "auto" is a GPU where there is one.

    Raises:
        UserError: no such model, one that has not been validated yet, or a damaged file.
    """
    if not Path(source).is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise UserError(f"no folder {source}")
        source = download(str(source))
    folder = RunFolder(source)
    if folder.has_begun() and folder.provenance.is_file():  # a run's, not an exported one
        if not folder.best.is_file():
            raise UserError(f"{folder} has no weights yet: its first validation has not ended")
        if not folder.is_completed():
            log.warning("%s has not completed: these are its best weights so far", folder)
    model = saved_model(folder, check_device(device, "device")).eval()
    model.__class__ = TrainedModel  # which adds methods, and no state of its own
    assert isinstance(model, TrainedModel)
    model.tokenizer = saved_tokenizer(folder)
    model.folder = folder
    return model
