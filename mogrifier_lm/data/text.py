"""Texts as people have them, made plain: decoded, their ends of lines, markers and forms made one.

A reader hands on blocks of UTF-8 in which "\\n" alone ends a line; what it changed, it counts.
"""

import codecs
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mogrifier_lm.errors import UserError
from mogrifier_lm.options import DataConfig

EOS, UNK = "<eos>", "<unk>"
SPACE = " \t\n\r\v\f"  # what separates words; other Unicode spaces are characters of words

MARKERS = dict.fromkeys(("<s>", "</s>"), "") | dict.fromkeys(
    ("UNK", "<UNK>", "[UNK]", "@@UNKNOWN@@", "<unknown>", "<UNKNOWN>"), UNK
)
_HIDDEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")  # of no width, and soft hyphens
_SPACES = re.compile("[\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
CHUNK = 1 << 22  # bytes read at a time


def words_of(line: str) -> list[str]:
    """The words of a line, between ASCII white space."""
    return [word.decode() for word in line.encode().split()]


def alone(*words: str) -> re.Pattern[str]:
    """A pattern that finds these words where they stand between white space."""
    return re.compile(f"(?<![^{SPACE}])(?:{'|'.join(map(re.escape, words))})(?![^{SPACE}])")


LAST_EOS, ANY_EOS = re.compile(f"{alone(EOS).pattern}[ \t\v\f]*(?=\n)"), alone(EOS)


@dataclass(frozen=True)
class Form:
    """How characters are written: `data.normalize` and `tokenizer.lowercase`."""

    normalize: str = "none"
    lowercase: bool = False

    def __call__(self, text: str) -> str:
        if self.lowercase:
            text = text.lower()
        if self.normalize == "none" or text.isascii():
            return text
        if self.normalize == "clean":
            text = _SPACES.sub(" ", _HIDDEN.sub("", text))
        return unicodedata.normalize("NFKC" if self.normalize == "nfkc" else "NFC", text)


PLAIN = Form()


class Reader:
    """Blocks of plain text out of a text as people have it; what was done to it is counted.

    Args:
        source: its `markers` and `spelled`.
        unit: what a token is at most, "word", "character" or "byte". Only where that is a word
            are there markers, and does a last line get an end that has none; bytes are handed on
            as they are.
        form: that the text is brought to.
        unk: a further word that stands for an unknown one.
        known: words that are no markers.
    """

    def __init__(
        self,
        source: DataConfig,
        unit: str = "word",
        form: Form = PLAIN,
        unk: str | None = None,
        known: Container[str] = (),
    ) -> None:
        self.unit, self.form, self.spelled = unit, form, source.spelled
        self.ends = unit == "word" and source.markers == "auto"
        self.markers = {k: v for k, v in MARKERS.items() if self.ends and k not in known}
        if unk and unk != UNK:
            self.markers[unk] = UNK
        self.marked = alone(*self.markers) if self.markers else None
        # Words in another form are counted, or what would be if nothing is asked for.
        self.other = Form("clean") if form.normalize == "none" else Form(form.normalize)
        self.counts: Counter[str] = Counter()
        self.carriage_returns = False

    def blocks(self, chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
        """The text in whole lines, or where these are very long in whole words.

        Args:
            chunks: its bytes.
            name: what errors call it.

        Raises:
            UserError: bytes that are not UTF-8, or an <eos> that ends no line.
        """
        if self.unit == "byte":
            texts = (chunk.decode("latin-1") for chunk in chunks)
            yield from (text.encode("latin-1") for text in self._cut(texts))
            return
        for text in self._cut(self._decoded(chunks, name)):
            if self.unit == "word":
                text = self._without_ends(text, name)
            if self.marked and any(word in text for word in self.markers):
                text = self.marked.sub(self._replaced, text)
            if self.spelled:
                if found := re.search(f"[^{SPACE}]{{2,}}", text):
                    raise UserError(f"{name} is not spelled out: it holds the word {found[0]!r}")
                text = text.replace(" ", "").replace("_", " ")
            if self.other(text) != text:
                lines = (line for line in text.split("\n") if self.other(line) != line)
                words = (word for line in lines for word in words_of(line))
                self.counts["form"] += sum(self.other(word) != word for word in words)
            yield self.form(text).encode()
        if 0 < self.counts[EOS] < self.counts["lines"]:
            raise UserError(
                f"{name}: {self.counts[EOS]:,} of {self.counts['lines']:,} lines end in {EOS}, "
                "which is added to every line: remove it, or end every line so"
            )

    def notes(self) -> list[str]:
        """What was done, in a line for each kind; [] where the text was plain."""
        found, c = [], self.counts
        if self.carriage_returns:
            found.append("a carriage return alone ends a line, as a line feed does")
        done = [f"{c[EOS]:,} final {EOS} are the ends of their lines"] if c[EOS] else []
        done += [f"{c[w]:,} {w} read as {new}" if new else f"{c[w]:,} {w} left out"
                 for w, new in self.markers.items() if c[w]]  # fmt: skip
        if done:
            found.append(f"markers: {', '.join(done)} (data.markers=keep leaves them)")
        if c["form"] and self.form.normalize != "none":
            found.append(f"data.normalize={self.form.normalize} changed {c['form']:,} words")
        return found

    def _decoded(self, chunks: Iterable[bytes], name: str) -> Iterator[str]:
        """Text whose lines end in a line feed, without a byte-order mark."""
        utf8 = codecs.getincrementaldecoder("utf-8")()
        decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        lines = done = 0
        for chunk in chain(chunks, [b""]):
            done += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
                if "\0" in text:
                    at = chunk.index(0)
                    raise UnicodeDecodeError("utf-8", chunk, at, at + 1, "NUL")
            except UnicodeDecodeError as error:
                raw, start = error.object, error.start
                line = lines + raw.count(b"\n", 0, start) + 1
                place = f"byte 0x{raw[start]:02x} at offset {done - len(raw) + start}, line {line}"
                raise UserError(f"{name} is not UTF-8: {place}; {_remedy(error)}") from error
            yield text if lines or done > len(chunk) else text.removeprefix("\ufeff")
            lines += text.count("\n")
        kinds = decoder.newlines  # one, or a tuple
        self.carriage_returns = kinds == "\r" or (isinstance(kinds, tuple) and "\r" in kinds)

    def _cut(self, texts: Iterable[str]) -> Iterator[str]:
        """The same text cut after ends of lines, or of more than a chunk before spaces."""
        rest, last = "", "\n"
        for text in texts:
            rest += text
            cut = rest.rfind("\n") + 1
            if not cut and len(rest) >= CHUNK:  # <eos> stays beside the end of its line
                cut = len(rest[: rest.rfind(" ") + 1].rstrip(" ").removesuffix(EOS))
            if cut:
                last = rest[cut - 1]
                yield rest[:cut]
                rest = rest[cut:]
        if self.unit == "byte" or rest.strip(SPACE) or last != "\n":
            yield rest + "\n" if self.unit == "word" else rest

    def _without_ends(self, text: str, name: str) -> str:
        """The text without an <eos> before each end of a line."""
        filled = sum(1 for line in text.split("\n")[:-1] if line.strip(SPACE))
        if EOS in text:
            if self.ends:
                text, count = LAST_EOS.subn("", text)
                self.counts[EOS] += count
            if found := ANY_EOS.search(text):
                line = self.counts["all lines"] + text.count("\n", 0, found.start()) + 1
                raise UserError(
                    f"{name}, line {line} holds the word {EOS}, which is added to every line: "
                    "remove it from the text"
                )
        self.counts["lines"] += filled
        self.counts["all lines"] += text.count("\n")
        return text

    def _replaced(self, found: re.Match[str]) -> str:
        self.counts[found[0]] += 1
        return self.markers[found[0]]


def _remedy(error: UnicodeDecodeError) -> str:
    """The command that makes a text UTF-8."""
    raw = error.object
    zeros = [raw[i::4].count(0) for i in range(4)]  # of ASCII characters, ends of lines at least
    low, high, most = zeros[0] + zeros[2], zeros[1] + zeros[3], 0.9 * (len(raw) // 4)
    known = "ENCODING (WINDOWS-1252, GB18030, UTF-16LE, …)"
    if min(zeros[2:]) > most or min(zeros[:2]) > most:
        known = "UTF-32LE" if zeros[3] > zeros[0] else "UTF-32BE"
    elif raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        known = "UTF-16"
    elif error.reason == "NUL" and (low == high or low + high < len(raw) / 50):
        return "tr -d '\\000' takes NULs out"
    elif low != high:
        known = "UTF-16LE" if high > low else "UTF-16BE"
    return f"iconv -f {known} -t UTF-8 converts it"


def measure(block: bytes, unit: str) -> Counter[str]:
    """Words (one <eos> a line), bytes and characters of plain text.

    Args:
        block: a text, or part of one.
        unit: of the tokenizer. For "word" one space counts between words, and none at the ends of
            lines, else spaces as they are; for "byte" each is a character.
    """
    words, lines = len(block.split()), block.count(b"\n")
    size = len(block)
    if unit == "word":
        blank = sum(1 for line in block.split(b"\n")[:-1] if not line or line.isspace())
        size = len(block.translate(None, SPACE.encode())) + words + blank
    # Bytes that begin no character.
    later = np.count_nonzero(np.frombuffer(block, np.int8) < -64) if unit != "byte" else 0
    return Counter(words=words + lines, bytes=size, characters=size - int(later))
