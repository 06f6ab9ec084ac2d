"""Minimal pairs: how often a trained model finds the good sentence likelier than the bad one.

    python scripts/pairs.py run=RUN_DIR pairs=pairs.tsv             # columns good, bad, phenomenon
    python scripts/pairs.py run=RUN_DIR pairs=blimp.jsonl           # BLiMP's own files
    python scripts/pairs.py run=RUN_DIR pairs=FILE save=scored.tsv  # and each pair with its nats

A sentence costs the sum over its words, <eos> among them, from a state of zeros. The column
phenomenon may be missing. Pairs with a word that the model does not know are left out and counted:
<unk> is cheap, whatever stands behind it. «equal length» is over pairs of as many words alone.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script
from mogrifier_lm.reports.table import markdown_table


@dataclass(frozen=True)
class Pair:
    good: str
    bad: str
    phenomenon: str = ""


@dataclass
class Scored:
    """A pair with the nats of its sentences, and whether the model knows all their words."""

    pair: Pair
    good: float
    bad: float
    known: bool
    same_length: bool

    @property
    def right(self) -> float:
        """1 where the good sentence is likelier, 1/2 where both are as likely, else 0."""
        return 0.5 if self.good == self.bad else float(self.good < self.bad)


def main(*, run: str, pairs: str, save: str = "", device: str = "auto") -> None:
    from mogrifier_lm.files import write_whole
    from mogrifier_lm.inference.lines import opened

    with opened(pairs, "rt") as file:
        read = list(read_pairs(file, pairs))
    if not read:
        raise UserError(f"{pairs} holds no pairs")
    from mogrifier_lm import load_model

    scored = list(score_pairs(load_model(run, device), read))
    print(markdown_table(accuracy_rows(scored)), end="")
    if save:
        rows = [(s.pair.phenomenon, s.pair.good, s.pair.bad, f"{s.good:.6f}", f"{s.bad:.6f}",
                 str(int(s.known))) for s in scored]  # fmt: skip
        head = ("phenomenon", "good", "bad", "good_nats", "bad_nats", "known")
        write_whole(Path(save), "".join("\t".join(r) + "\n" for r in (head, *rows)))


def read_pairs(file: TextIO, path: str) -> Iterator[Pair]:
    """The pairs of a table with a header, or of JSON lines as BLiMP has them."""
    first = file.readline().rstrip("\r\n")
    if first.startswith("{"):
        for line in (first, *file):
            try:
                value = json.loads(line)
                names = (value.get(k) for k in ("UID", "linguistics_term", "phenomenon"))
                name = next((n for n in names if n), "")
                good, bad = ("".join(value[f"sentence_{kind}"]) for kind in ("good", "bad"))
                yield Pair(good, bad, name)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"{path}: a line is no object with sentence_good, sentence_bad: {line[:50]!r}"
                ) from error
        return
    if not first:
        return
    columns = first.split("\t")
    if not {"good", "bad"} <= set(columns):
        raise UserError(f"{path} has the columns {', '.join(columns)}, it needs good and bad")
    for row in file:
        cells = dict(zip(columns, row.rstrip("\r\n").split("\t"), strict=False))
        if not {"good", "bad"} <= set(cells):
            raise UserError(f"{path}: a row lacks good or bad: {row[:60]!r}")
        yield Pair(cells["good"], cells["bad"], cells.get("phenomenon", ""))


def score_pairs(model: Any, pairs: Iterable[Pair]) -> Iterator[Scored]:
    """Each pair with the nats of its sentences; `model` is what `load_model` returns."""
    from mogrifier_lm.inference.lines import Line
    from mogrifier_lm.inference.score import score_lines

    pairs = list(pairs)
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    nats, unknown, words = ([0.0] * len(sentences) for _ in range(3))
    for word in score_lines(model, model.tokenizer, map(Line, sentences)):
        i = word.sentence - 1
        nats[i] += word.nats
        unknown[i] += word.unk
        words[i] += 1
    for k, pair in enumerate(pairs):
        g, b = 2 * k, 2 * k + 1
        known = not unknown[g] + unknown[b]
        yield Scored(pair, nats[g], nats[b], known, words[g] == words[b])


def accuracy_rows(scored: Iterable[Scored]) -> list[dict[str, Any]]:
    """A row for each phenomenon, and one for all pairs."""
    scored = list(scored)
    names = sorted({s.pair.phenomenon for s in scored})
    groups = [(name, [s for s in scored if s.pair.phenomenon == name]) for name in names]
    if len(groups) > 1:
        groups.append(("all", scored))

    def share(some: list[Scored]) -> str:
        return f"{sum(s.right for s in some) / len(some):.1%}" if some else ""

    rows = []
    for name, group in groups:
        used = [s for s in group if s.known]
        equal = [s for s in used if s.same_length]
        rows.append({
            "phenomenon": name or "all", "pairs": f"{len(used):,}", "accuracy": share(used),
            "equal length": f"{len(equal):,}", "accuracy there": share(equal),
            "left out for <unk>": f"{len(group) - len(used):,}",
        })  # fmt: skip
    return rows


command = partial(script, main)
