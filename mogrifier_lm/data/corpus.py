"""Corpora: three splits of text, wherever they come from, as cached arrays of token ids."""

import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mogrifier_lm.data.source import SPLITS, Part, cache_of, find_parts, text_place
from mogrifier_lm.data.subwords import TOKENIZERS, load_tokenizer
from mogrifier_lm.data.text import EOS, UNK, Form, Reader, measure, words_of
from mogrifier_lm.data.tokenizer import Tokenizer, WordTokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import digest, fill_folder, read_json
from mogrifier_lm.options import LONG_WORD, DataConfig, TokenizerConfig
from mogrifier_lm.terminal import progress_bar

log = logging.getLogger(__name__)

MEASURES = ("words", "bytes", "characters", "unknown")  # of a split
VOCABULARY = "vocabulary.json"
CACHE_FORMAT = 4  # raised when the files of a cache entry change their meaning


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: ids [N]; words count one <eos> a line; bytes are UTF-8, a space or line break
    after each word, a blank line one byte (characters likewise). `floor_nats` is -ln p under the
    true source, where that is known."""

    ids: np.ndarray
    words: int
    bytes: int
    characters: int = 0
    unknown: int = 0  # tokens that are <unk>
    sha256: str
    floor_nats: float | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    name: str
    tokenizer: Tokenizer
    splits: dict[str, Split]


def load_corpus(source: DataConfig, tokenizer: TokenizerConfig | None = None) -> Corpus:
    """Read, tokenize and check a corpus; the second time from the cache.

    Args:
        source: where the text is: `dir`, else $MOGRIFIER_LM_DATA/`folder`, else the cache, where
            `texts.fetch` has put it.
        tokenizer: by default a word a token.

    Raises:
        UserError: text that is missing, empty or not UTF-8; a cache folder that
            cannot be written.
    """
    tokenizer = tokenizer or TokenizerConfig()
    place = text_place(source)
    unit = TOKENIZERS[tokenizer.name].unit
    parts = find_parts(place, source, exact=unit != "word")
    hashes = {split: part.sha256() for split, part in parts.items()}
    entry = cache_of(source) / "tokens" / digest(CACHE_FORMAT, _settings(source, tokenizer), hashes)
    if not entry.is_dir():
        fill_folder(entry, lambda tmp: _tokenize(parts, source, tokenizer, tmp))
    facts = read_json(entry / "splits.json", required=True)
    floors = read_json(place / "floor.json") if place.is_dir() else {}
    vocabulary = load_tokenizer(entry / VOCABULARY)
    try:
        splits = {
            split: Split(
                ids=np.memmap(entry / f"{split}.ids", vocabulary.dtype, "r"),
                **{key: facts[split][key] for key in MEASURES},
                sha256=hashes[split],
                floor_nats=floors.get(split),
            )
            for split in SPLITS
        }
        if any(zlib.crc32(splits[split].ids.data) != facts[split]["crc32"] for split in SPLITS):
            raise ValueError("other bytes")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{entry} is damaged: remove it, then it is made anew") from error
    corpus = Corpus(name=source.name, tokenizer=vocabulary, splits=splits)
    for split in SPLITS:
        for note in facts[split]["notes"]:
            log.info("%s, %s: %s", source.name, split, note)
    other_forms = {split: facts[split]["other form"] for split in SPLITS}
    for doubt in _doubts(corpus, source, other_forms):
        log.warning("%s: %s", source.name, doubt)
    return corpus


def _settings(source: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What, beside the text, decides which tokens it becomes."""
    values = dict(vars(tokenizer))
    values |= {key: getattr(source, key) for key in ("normalize", "markers", "spelled")}
    if tokenizer.vocabulary:
        path = Path(tokenizer.vocabulary)
        files = [file for file in (path, path.with_suffix(".model")) if file.is_file()]
        values["vocabulary"] = [Part(file).sha256() for file in files]
    return values


def _tokenize(
    parts: Mapping[str, Part], source: DataConfig, config: TokenizerConfig, out: Path
) -> None:
    """Write the files of a cache entry: the tokenizer, ids of each split, and facts about it."""
    kind = TOKENIZERS[config.name]
    for part in parts.values():
        if not any(chunk.strip() for chunk in part.chunks()):
            raise UserError(f"{'a part of ' * bool(part.start or part.stop)}{part.path} is empty")

    def blocks(split: str, form: Form, doing: str) -> tuple[Reader, Iterator[bytes]]:
        reader = Reader(source, kind.unit, form, config.unk)
        chunks = _shown(parts[split], f"{doing} {split}")
        return reader, reader.blocks(chunks, str(parts[split].path))

    def texts(*splits: str) -> Iterator[bytes]:
        for split in splits:
            yield from blocks(split, form, "reading")[1]

    form = Form(source.normalize, config.lowercase)
    if config.vocabulary:
        tokenizer = _taken(Path(config.vocabulary), kind, form)
    else:
        settings = {k: v for k, v in vars(config).items() if v is not None and k in kind.settings}
        tokenizer = kind.train(texts("train"), texts("valid", "test"), form=form, **settings)
    tokenizer.save(out / VOCABULARY)
    facts = {}
    for split in SPLITS:
        reader, text = blocks(split, tokenizer.form, "cutting")
        counts, crc = Counter(dict.fromkeys(MEASURES, 0)), 0
        with open(out / f"{split}.ids", "wb") as file:
            for block in text:
                ids = tokenizer.encode_block(block)
                file.write(ids.data)
                crc = zlib.crc32(ids.data, crc)
                counts.update(measure(block, kind.unit))
                counts["unknown"] += int((ids == tokenizer.index.get(UNK, -1)).sum())
        found = {"crc32": crc, "other form": reader.counts["form"], "notes": reader.notes()}
        facts[split] = {**counts, **found}
    (out / "splits.json").write_text(json.dumps(facts), encoding="utf-8")


def _shown(part: Part, doing: str) -> Iterator[bytes]:
    """The bytes of a text, with a progress bar."""
    total = part.stop and part.stop - part.start
    if total is None and part.path.suffix != ".gz":
        total = part.path.stat().st_size
    with progress_bar(total=total, desc=doing, unit="B", unit_scale=True, leave=False) as bar:
        for chunk in part.chunks():
            yield chunk
            bar.update(len(chunk))


def _taken(path: Path, kind: type[Tokenizer], form: Form) -> Tokenizer:
    """The tokenizer of another run, or one of a list of words.

    Raises:
        UserError: there is none, or one of another kind.
    """
    if path.suffix == ".json":
        tokenizer = load_tokenizer(path)
        if type(tokenizer) is not kind:
            raise UserError(
                f"tokenizer.vocabulary={path} is one of tokenizer={tokenizer.name}: give it"
            )
        return tokenizer
    if kind is not WordTokenizer or not path.is_file():
        raise UserError(
            f"tokenizer.vocabulary={path}: a run's folder is meant, or with tokenizer=word a file "
            "with a word a line"
        )
    text = b"".join(Reader(DataConfig(markers="keep")).blocks(Part(path).chunks(), str(path)))
    return WordTokenizer(list(dict.fromkeys([*words_of(text.decode()), EOS])), form)


def _doubts(corpus: Corpus, source: DataConfig, other_forms: Mapping[str, int]) -> Iterator[str]:
    """What makes the figures of a text misleading, and what to do."""
    splits, tokenizer = corpus.splits, corpus.tokenizer
    if source.expected:
        words = tokenizer.unit == "word"
        counts = {f"{k} tokens": s.words if words else len(s.ids) for k, s in splits.items()}
        if tokenizer.name != "sentencepiece":
            counts["types"] = len(tokenizer)
        for what, count in counts.items():
            published = getattr(source.expected, what.removesuffix(" tokens"))
            if published not in (None, count):
                yield (
                    f"{count:,} {what}, published {published:,}: perplexities do not compare with "
                    "the literature's"
                )
        return
    train = splits["train"]
    valid, test = (100 * splits[s].unknown / len(splits[s].ids) for s in ("valid", "test"))
    if train.unknown == 0 and (valid or test):
        yield (
            f"{valid:.2f} % of the validation and {test:.2f} % of the test tokens are unknown "
            "words, and the training text holds no <unk> to learn from: tokenizer.min_count=2 "
            "reads its rare words as such"
        )
    if tokenizer.name == "word" and train.characters > LONG_WORD * train.words:
        yield (
            f"its words have {train.characters / train.words:.0f} characters on average, so white "
            "space does not part them, and perplexity means little: tokenizer=sentencepiece or "
            "tokenizer=char"
        )
    shares = {split: other_forms[split] / splits[split].words for split in splits}
    if source.normalize == "none" and max(shares.values()) - min(shares.values()) > 1e-3:
        found = ", ".join(f"{share:.1%} of {split}" for split, share in shares.items())
        yield (
            f"words with zero-width characters, other spaces or decomposed accents are {found}: "
            "data.normalize=clean makes them one form"
        )
