"""Corpora: three splits of text, wherever they come from, as cached arrays of token ids."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mogrifier_lm.data import synthetic
from mogrifier_lm.data.tokenizer import (
    EOS,
    TOKENIZERS,
    UNK,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import cache_folder
from mogrifier_lm.options import DataConfig, TokenizerConfig

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
FILE_NAMES = ("{}.txt", "ptb.{}.txt", "wiki.{}.tokens")  # ours, then those of the releases
CACHE_FORMAT = 1  # raised when the files of a cache entry change their meaning


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: ids [N]; words count one <eos> a line; bytes are UTF-8, a space or line break
    after each word, a blank line one byte. `floor_nats` is -ln p under the true source, where
    that is known."""

    ids: np.ndarray
    words: int
    bytes: int
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
    cache = Path(source.cache_dir) if source.cache_dir else cache_folder()
    settings = {k: v for k, v in vars(tokenizer or TokenizerConfig()).items() if v is not None}
    name = settings.pop("name")
    folder = _text_folder(source, cache)
    raw = {split: _read(folder, split) for split in SPLITS}
    hashes = {split: hashlib.sha256(text).hexdigest() for split, text in raw.items()}
    entry = cache / "tokens" / _digest(CACHE_FORMAT, name, settings, hashes)
    if not entry.is_dir():
        _publish(entry, lambda tmp: _tokenize(raw, folder, name, settings, tmp))
    facts = json.loads((entry / "splits.json").read_text())
    floor_file = folder / "floor.json"
    floors = json.loads(floor_file.read_text()) if floor_file.is_file() else {}
    splits = {
        split: Split(
            ids=np.load(entry / f"{split}.npy", mmap_mode="r"),
            words=facts[split]["words"],
            bytes=facts[split]["bytes"],
            sha256=hashes[split],
            floor_nats=floors.get(split),
        )
        for split in SPLITS
    }
    corpus = Corpus(
        name=source.name, tokenizer=load_tokenizer(entry / "tokenizer.json"), splits=splits
    )
    _compare_counts(corpus, source)
    return corpus


def _text_folder(source: DataConfig, cache: Path) -> Path:
    """The folder that holds the three text files of the source."""
    if source.dir:
        folder = Path(source.dir)
        if not folder.is_dir():
            raise UserError(f"data.dir: no folder {source.dir}")
        return folder
    if source.name == "synthetic":
        version = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()
        folder = cache / "text" / f"synthetic-{_digest(version, source.seed)}"
        if not folder.is_dir():
            _publish(folder, lambda tmp: _generate(source.seed, tmp))
        return folder
    root = os.environ.get("MOGRIFIER_LM_DATA")
    if root and source.folder and (Path(root) / source.folder).is_dir():
        return Path(root) / source.folder
    if not source.hub_path:
        raise UserError(
            f"data={source.name} needs data.dir=FOLDER with train.txt, valid.txt and test.txt, or "
            "data.hub_path=NAME of the hub"
        )
    hub = (source.hub_path, source.hub_name, source.hub_revision, source.hub_column)
    folder = cache / "text" / f"{source.name}-{_digest(*hub)}"
    if not folder.is_dir():
        _publish(folder, lambda tmp: _download(source, tmp))
    return folder


def _generate(seed: int, folder: Path) -> None:
    """The synthetic text and, beside it, -ln p of each split under its source."""
    log.info("generating the synthetic language")
    language = synthetic.SyntheticLanguage(seed)
    floors = {}
    for i, split in enumerate(SPLITS):
        size = synthetic.TRAIN_TOKENS if split == "train" else synthetic.EVAL_TOKENS
        lines = language.sample(size, seed=3 * seed + i)
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        if split != "train":
            floors[split] = language.nats(lines)
    (folder / "floor.json").write_text(json.dumps(floors))


def _download(source: DataConfig, folder: Path) -> None:
    hint = "give data.dir=FOLDER with train.txt, valid.txt, test.txt, or set MOGRIFIER_LM_DATA"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data={source.name} needs the package datasets, or {hint}") from error
    log.info("downloading %s from the hub", source.hub_path)
    try:
        splits = datasets.load_dataset(
            source.hub_path, source.hub_name, revision=source.hub_revision
        )
    except Exception as error:  # the hub's errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data={source.name}: {source.hub_path} cannot be had from the hub ({reason}); {hint}"
        ) from error
    for split, hub_split in HUB_SPLITS.items():
        if hub_split not in splits or source.hub_column not in splits[hub_split].column_names:
            raise UserError(
                f"data={source.name}: {source.hub_path} has no split {hub_split} with a column "
                f"{source.hub_column}; {hint}"
            )
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            for line in splits[hub_split][source.hub_column]:
                file.write(line.rstrip("\n") + "\n")


def _find(folder: Path, split: str) -> Path:
    for name in FILE_NAMES:
        if (folder / name.format(split)).is_file():
            return folder / name.format(split)
    raise UserError(f"no {split}.txt in {folder}: a corpus is train.txt, valid.txt and test.txt")


def _read(folder: Path, split: str) -> bytes:
    path = _find(folder, split)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not raw.strip():
        raise UserError(f"{path} is empty")
    return raw


def split_lines(raw: bytes, path: str | Path) -> list[str]:
    """The lines of a text in UTF-8; `path` is what errors call it.

    Raises:
        UserError: bytes that are not UTF-8, or the word <eos> in the text.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise UserError(f"{path} is not UTF-8: {byte}, line {line}") from error
    lines = text.removeprefix("\ufeff").split("\n")
    if not lines[-1].strip():
        lines.pop()
    if EOS in text:
        for number, words in enumerate(map(str.split, lines), start=1):
            if EOS in words:
                raise UserError(
                    f"{path}, line {number} holds the word {EOS}, which is added to every line: "
                    "remove it from the text"
                )
    return lines


def _tokenize(
    raw: Mapping[str, bytes],
    folder: Path,
    tokenizer: str,
    settings: Mapping[str, Any],
    out: Path,
) -> None:
    lines = {split: split_lines(text, _find(folder, split)) for split, text in raw.items()}
    others = (line for split in ("valid", "test") for line in lines[split])
    tok = TOKENIZERS[tokenizer].train(lines["train"], others, **settings)
    tok.save(out / "tokenizer.json")
    facts = {}
    for split in SPLITS:
        np.save(out / f"{split}.npy", tok.encode(lines[split]))
        facts[split] = _measure(lines[split])
    (out / "splits.json").write_text(json.dumps(facts))


def _measure(lines: Sequence[str]) -> dict[str, int]:
    """Words with one <eos> a line, and bytes of the text with single spaces."""
    words = num_bytes = 0
    for line in lines:
        parts = line.split()
        words += len(parts) + 1
        num_bytes += len(" ".join(parts).encode()) + 1
    return {"words": words, "bytes": num_bytes}


def _compare_counts(corpus: Corpus, source: DataConfig) -> None:
    counts = {split: corpus.splits[split].words for split in SPLITS}
    if isinstance(corpus.tokenizer, WordTokenizer):
        counts = {"types": len(corpus.tokenizer), **counts}
    expected_counts = vars(source.expected) if source.expected else {}
    for what, expected in expected_counts.items():
        if expected and counts.get(what, expected) != expected:
            log.warning(
                "%s: %s %s, published %s: perplexities do not compare with the literature's",
                corpus.name,
                f"{counts[what]:,}",
                what if what == "types" else f"{what} tokens",
                f"{expected:,}",
            )
    unk = corpus.tokenizer.index.get(UNK)
    if isinstance(corpus.tokenizer, WordTokenizer) and unk is not None and not source.expected:
        share = {s: float((corpus.splits[s].ids == unk).mean()) for s in SPLITS}
        if share["train"] == 0:
            log.warning(
                "%s: %.2f %% of the validation and %.2f %% of the test tokens are unknown words, "
                "and the training text holds no <unk> to learn from",
                corpus.name,
                100 * share["valid"],
                100 * share["test"],
            )


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _publish(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then rename it: whole or not there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tmp-"))
    except OSError as error:
        raise UserError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}): "
            "give data.cache_dir=FOLDER"
        ) from error
    try:
        fill(tmp)
        tmp.chmod(0o755)
        try:
            tmp.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
