"""What lies under a perplexity: the cost of words by training count, by place, and one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mogrifier_lm.data import EOS, Tokenizer
from mogrifier_lm.evaluators.score import perplexity
from mogrifier_lm.files import replacing, write_whole
from mogrifier_lm.reports.plots import can_plot, caption, pyplot, save
from mogrifier_lm.reports.table import markdown_table

COUNT_BANDS = (0, 1, 10, 100, 1000, 10_000)  # least training count of each band
PLACE_BANDS = (1, 2, 3, 4, 5, 6, 11, 21, 41)


@dataclass(frozen=True, kw_only=True)
class WordNats:
    """A text word by word, <eos> among the words.

    nats [W] is -ln p, over all tokens of a word; places [W] count from 1 at the start of a line,
    counts [W] are occurrences in the training text.
    """

    words: list[str]
    nats: np.ndarray
    places: np.ndarray
    counts: np.ndarray

    def save(self, path: Path) -> None:
        """Write tab-separated values, a word a line."""
        rows = zip(self.words, self.nats, self.places, self.counts, strict=True)
        lines = (f"{word}\t{nats:.6f}\t{place}\t{count}" for word, nats, place, count in rows)
        write_whole(path, "\n".join(["word\tnats\tplace\ttraining_count", *lines]) + "\n")


def per_word(tokenizer: Tokenizer, ids: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Add up nats word by word.

    Args:
        tokenizer: says which tokens begin a word.
        ids: [N] the tokens; the first begins a word.
        nats: [N] of each.

    Returns:
        [W] the sums.
    """
    return np.add.reduceat(nats, np.flatnonzero(tokenizer.starts[ids]))


def word_nats(
    tokenizer: Tokenizer, ids: np.ndarray, nats: np.ndarray, counts: Mapping[str, int]
) -> WordNats:
    """The words of a text that begins at the start of a line.

    Args:
        tokenizer: of the ids.
        ids: [N] tokens.
        nats: [N] -ln p of each.
        counts: of words in the training text.
    """
    words = tokenizer.decode_words(ids)
    ends = np.array([word == EOS for word in words])
    line_starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
    return WordNats(
        words=words,
        nats=per_word(tokenizer, ids, nats),
        places=np.arange(len(words)) - line_starts[np.cumsum(ends) - ends] + 1,
        counts=np.array([counts.get(word, 0) for word in words]),
    )


@dataclass(frozen=True)
class Band:
    label: str
    words: int
    nats: float

    @property
    def mean(self) -> float:
        return self.nats / self.words


def bands(values: np.ndarray, nats: np.ndarray, least: Sequence[int]) -> list[Band]:
    """Words and their nats by bands of a value; empty bands are left out.

    Args:
        values: [W] of each word, whole numbers.
        nats: [W] of each word.
        least: rising; band i holds least[i] <= value < least[i + 1], the last has no end.
    """
    places, found = np.digitize(values, least) - 1, []
    for i, low in enumerate(least):
        inside = places == i
        high = least[i + 1] - 1 if i + 1 < len(least) else None
        label = f"{low:,}" if low == high else f"{low:,}–{high:,}" if high else f"≥ {low:,}"
        if inside.any():
            found.append(Band(label, int(inside.sum()), float(nats[inside].sum())))
    return found


def words_table(text: WordNats, title: str, min_count: int = 10, rows: int = 15) -> str:
    """Markdown: nats by training count and by place, and the words that cost most and least.

    Args:
        text: scored.
        title: of the page.
        min_count: words that occur less often in the text are not listed singly.
        rows: words a list.
    """
    total, size = float(text.nats.sum()), len(text.words)
    mean = total / size
    out = [f"# {title}: {size:,} words, {mean:.4f} nats a word, perplexity {perplexity(mean):.2f}"]
    for head, values, least in (
        ("training count", text.counts, COUNT_BANDS),
        ("place in line", text.places, PLACE_BANDS),
    ):
        body = [
            (
                band.label,
                f"{band.words:,}",
                f"{band.words / size:.1%}",
                f"{band.mean:.3f}",
                f"{perplexity(band.mean):,.1f}",
                f"{band.nats / total:.1%}",
            )
            for band in bands(values, text.nats, least)
        ]
        heads = (head, "words", "of words", "nats a word", "perplexity", "of nats")
        out.append(markdown_table([dict(zip(heads, row, strict=True)) for row in body]))
    sums: dict[str, list[float]] = {}
    for word, nats in zip(text.words, text.nats.tolist(), strict=True):
        sums.setdefault(word, []).append(nats)
    often = {word: nats for word, nats in sums.items() if len(nats) >= min_count}

    def ranked(key: Callable[[str], float], sign: int) -> list[str]:
        chosen = sorted(often, key=lambda word: (sign * key(word), word))[:rows]
        cells = ((word, key(word), len(often[word])) for word in chosen)
        return [f"{word} {value:,.2f} (×{n:,})" for word, value, n in cells]

    def average(word: str) -> float:
        return sum(often[word]) / len(often[word])

    def summed(word: str) -> float:
        return sum(often[word])

    columns = [ranked(average, -1), ranked(average, 1), ranked(summed, -1), ranked(summed, 1)]
    out.append(f"Words that occur at least {min_count} times, with nats and occurrences:")
    lists = ("highest mean", "lowest mean", "highest sum", "lowest sum")
    ranks = zip(*columns, strict=True)
    out.append(markdown_table([dict(zip(lists, rank, strict=True)) for rank in ranks]))
    return "\n\n".join(part.rstrip("\n") for part in out) + "\n"


def plot_words(text: WordNats, title: str, path: Path) -> None:
    """Draw mean nats by training count and by place, with each band's share of all nats.

    Args:
        text: word by word.
        title: of the figure.
        path: of the image.
    """
    if not can_plot(path.name):
        return
    plt = pyplot()
    total, mean = float(text.nats.sum()), float(text.nats.mean())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    figure.suptitle(f"{caption(title)}: {mean:.3f} nats a word; in each bar its share of all nats")
    for axis, name, values, least in (
        (axes[0], "occurrences in the training text", text.counts, COUNT_BANDS),
        (axes[1], "place in the line", text.places, PLACE_BANDS),
    ):
        found = bands(values, text.nats, least)
        labels = [band.label for band in found]
        axis.bar(labels, [band.mean for band in found], color="0.8", edgecolor="0.2")
        for x, band in enumerate(found):
            axis.text(x, 0.01 * mean, f"{band.nats / total:.0%}", ha="center", va="bottom")
        axis.axhline(mean, color="black", linestyle="--", linewidth=1, label="all words")
        axis.set_xlabel(name)
    axes[0].set_ylabel("nats a word")
    axes[0].legend(frameon=False)
    with replacing(path) as new:
        save(figure, new)
