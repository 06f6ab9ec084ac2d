"""Corpora: three splits of text, wherever they come from, as cached arrays of token ids."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mogrifier_lm.data.source import SPLITS, Part, find_parts, text_hash, text_place
from mogrifier_lm.data.subwords import TOKENIZERS, load_tokenizer
from mogrifier_lm.data.text import EOS, UNK, Form, Reader, measure, words_of
from mogrifier_lm.data.tokenizer import Tokenizer, WordTokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import cache_folder, digest, fill_folder, read_json
from mogrifier_lm.options import LONG_WORD, DataConfig, TokenizerConfig
from mogrifier_lm.terminal import progress_bar

log = logging.getLogger(__name__)

MEASURES = ("words", "bytes", "characters", "unknown")  # of a split
VOCABULARY = "vocabulary.json"
CACHE_FORMAT = 2  # raised when the files of a cache entry change their meaning


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
        source: where the text is: `dir`, else $MOGRIFIER_LM_DATA/`folder`, else the hub; the name
            "synthetic" is generated.
        tokenizer: by default a word a token.

    Raises:
        UserError: text that is missing, empty, not UTF-8 or unreachable; a cache folder that
            cannot be written.
    """
    tokenizer = tokenizer or TokenizerConfig()
    cache = Path(source.cache_dir).expanduser() if source.cache_dir else cache_folder()
    place = text_place(source, cache)
    unit = TOKENIZERS[tokenizer.name].unit
    parts = find_parts(place, source, exact=unit != "word")
    hashes = {split: text_hash(part, cache) for split, part in parts.items()}
    entry = cache / "tokens" / digest(CACHE_FORMAT, _settings(source, tokenizer), hashes)
    if not entry.is_dir():
        fill_folder(entry, lambda tmp: _tokenize(parts, source, tokenizer, tmp))
    facts = read_json(entry / "splits.json", required=True)
    floors = read_json(place / "floor.json") if source.name == "synthetic" else {}
    splits = {
        split: Split(
            ids=np.load(entry / f"{split}.npy", mmap_mode="r"),
            **{key: facts[split][key] for key in MEASURES},
            sha256=hashes[split],
            floor_nats=floors.get(split),
        )
        for split in SPLITS
    }
    corpus = Corpus(name=source.name, tokenizer=load_tokenizer(entry / VOCABULARY), splits=splits)
    for split in SPLITS:
        for note in facts[split]["notes"]:
            log.info("%s, %s: %s", source.name, split, note)
    _compare_counts(corpus, source)
    if not source.expected:
        _warn(corpus, source, {split: facts[split]["other form"] for split in SPLITS})
    return corpus


def _settings(source: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What, beside the text, decides which tokens it becomes."""
    values = dict(vars(tokenizer))
    values |= {key: getattr(source, key) for key in ("normalize", "markers", "spelled")}
    if tokenizer.vocabulary:
        path = Path(tokenizer.vocabulary).expanduser()
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
            raise UserError(f"{part.path} is empty")

    def blocks(split: str, form: Form, doing: str) -> tuple[Reader, Iterator[bytes]]:
        reader = Reader(source, kind.unit, form, config.unk)
        chunks = _shown(parts[split], f"{doing} {split}")
        return reader, reader.blocks(chunks, str(parts[split].path))

    def texts(*splits: str) -> Iterator[bytes]:
        for split in splits:
            yield from blocks(split, form, "reading")[1]

    form = Form(source.normalize, config.lowercase)
    if config.vocabulary:
        tokenizer = _taken(Path(config.vocabulary).expanduser(), kind, form)
    else:
        settings = {k: v for k, v in vars(config).items() if v is not None and k in kind.settings}
        tokenizer = kind.train(texts("train"), texts("valid", "test"), form=form, **settings)
    tokenizer.save(out / VOCABULARY)
    facts = {}
    for split in SPLITS:
        reader, text = blocks(split, tokenizer.form, "cutting")
        counts = Counter(dict.fromkeys(MEASURES, 0))
        with open(out / f"{split}.npy", "wb") as file:
            dtype, size = tokenizer.dtype, 0
            _write_header(file, dtype, size)
            for block in text:
                ids = tokenizer.encode_block(block)
                size += len(ids)
                file.write(ids.data)
                counts.update(measure(block, kind.unit))
                counts["unknown"] += int((ids == tokenizer.index.get(UNK, -1)).sum())
            _write_header(file, dtype, size)
        found = reader.counts["form"]
        facts[split] = {**counts, "other form": found, "notes": reader.notes()}
    (out / "splits.json").write_text(json.dumps(facts), encoding="utf-8")


def _write_header(file: BinaryIO, dtype: np.dtype[Any], size: int) -> None:
    """Write a .npy file's header, anew too: its length does not depend on the size."""
    file.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)


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


def _compare_counts(corpus: Corpus, source: DataConfig) -> None:
    unit = corpus.tokenizer.unit
    counts = {
        s: split.words if unit == "word" else len(split.ids) for s, split in corpus.splits.items()
    }
    if corpus.tokenizer.name != "sentencepiece":
        counts["types"] = len(corpus.tokenizer)
    for what, expected in vars(source.expected).items() if source.expected else ():
        if expected is not None and counts.get(what, expected) != expected:
            log.warning(
                "%s: %s %s, published %s: perplexities do not compare with the literature's",
                corpus.name,
                f"{counts[what]:,}",
                what if what == "types" else f"{what} tokens",
                f"{expected:,}",
            )


def _warn(corpus: Corpus, source: DataConfig, other_form: Mapping[str, int]) -> None:
    """Say what makes the figures of a text misleading, and what to do."""
    name, splits = corpus.name, corpus.splits
    if splits["train"].unknown == 0 and (splits["valid"].unknown or splits["test"].unknown):
        log.warning(
            "%s: %.2f %% of the validation and %.2f %% of the test tokens are unknown words, and "
            "the training text holds no <unk> to learn from: tokenizer.min_count=2 reads its rare "
            "words as such",
            name,
            *(100 * splits[s].unknown / len(splits[s].ids) for s in ("valid", "test")),
        )
    train = splits["train"]
    if corpus.tokenizer.name == "word" and train.characters > LONG_WORD * train.words:
        log.warning(
            "%s: its words have %.0f characters on average, so white space does not part them, "
            "and perplexity means little: tokenizer=sentencepiece or tokenizer=char",
            name,
            train.characters / train.words,
        )
    shares = {s: other_form[s] / splits[s].words for s in splits}
    if source.normalize == "none" and max(shares.values()) - min(shares.values()) > 1e-3:
        log.warning(
            "%s: words with zero-width characters, other spaces or decomposed accents are %s: "
            "data.normalize=clean makes them one form",
            name,
            ", ".join(f"{share:.1%} of {split}" for split, share in shares.items()),
        )
