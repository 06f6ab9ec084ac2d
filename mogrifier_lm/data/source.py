"""Where texts come from: a folder, one file, the hub, or the synthetic language."""

import gzip
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mogrifier_lm.data import synthetic
from mogrifier_lm.data.text import CHUNK
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import digest, fill_folder, read_json, write_json
from mogrifier_lm.options import DataConfig
from mogrifier_lm.terminal import shown

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
NAMES = {"train": ("train",), "valid": ("valid", "val", "dev", "validation"), "test": ("test",)}
PATTERNS = ("{}.txt", "{}.tokens", "ptb.{}.txt", "wiki.{}.tokens")  # ours, then of the releases
SPELLED_PATTERNS = ("ptb.char.{}.txt", "{}.txt")

HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
LARGE = 1 << 26  # bytes from which a file that has not changed is not read again for its hash


@dataclass(frozen=True)
class Part:
    """A file, gzipped or not, or its bytes [start, stop)."""

    path: Path
    start: int = 0
    stop: int | None = None

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, unpacked.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with _opened(self.path) as file:
                place = file.seek(self.start)
                while chunk := file.read(min(CHUNK, (self.stop or 1 << 62) - place)):
                    place += len(chunk)
                    yield chunk
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path} cannot be read: {reason}") from error

    def sha256(self) -> str:
        """Of its bytes, unpacked."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def find_parts(path: Path, source: DataConfig, exact: bool) -> dict[str, Part]:
    """The three texts of a folder, by the names that people give them, or of one file.

    Args:
        path: the folder or file.
        source: its `spelled` chooses among names, its `shares` cut a single file.
        exact: a single file is cut to the byte; else after the next end of a line.

    Raises:
        UserError: they are not there.
    """
    if path.is_dir():
        single = [path / f"{source.name}{end}" for end in ("", ".txt", ".gz", ".txt.gz")]
        found = {split: _candidates(path, split, source.spelled) for split in SPLITS}
        whole = next((file for file in single if file.is_file()), None)
        if whole is None or any(found.values()):
            for split, files in found.items():
                if not files:
                    raise UserError(
                        f"no {split}.txt in {path}: a corpus is train.txt, valid.txt and test.txt, "
                        "or one file that data.dir names"
                    )
                if len(files) > 1:
                    log.warning(
                        "%s is read, not %s", files[0], ", ".join(f.name for f in files[1:])
                    )
            return {split: Part(files[0]) for split, files in found.items()}
        path = whole
    return _cut(path, source.shares, exact)


def _candidates(folder: Path, split: str, spelled: bool) -> list[Path]:
    patterns = SPELLED_PATTERNS if spelled else PATTERNS
    names = [p.format(n) + gz for p in patterns for n in NAMES[split] for gz in ("", ".gz")]
    return [folder / name for name in names if (folder / name).is_file()]


def _cut(path: Path, shares: list[float], exact: bool) -> dict[str, Part]:
    """One file as three texts, in order."""
    size = sum(map(len, Part(path).chunks()))
    edges = [0]
    for share in (shares[0], shares[0] + shares[1]):
        edge, rest = round(size * share / sum(shares)), b""
        for chunk in Part(path, edge).chunks() if not exact else ():
            rest += chunk
            if found := re.search(rb"[\r\n]+", rest):
                break
        else:
            found = re.search(rb" ", rest)
        edges.append(edge + (found.end() if found else 0))
    parts = [Part(path, *ends) for ends in pairwise([*edges, size])]
    named = (f"{share:.0%} {split}" for share, split in zip(shares, SPLITS, strict=True))
    log.info("%s is cut into %s, in this order", path, ", ".join(named))
    return dict(zip(SPLITS, parts, strict=True))


def text_hash(part: Part, cache: Path) -> str:
    """The hash of a text; of a large file that has not changed, what it was."""
    stat = part.path.stat()
    if stat.st_size < LARGE:
        return part.sha256()
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    known = (
        cache / "hashes" / f"{digest(str(part.path.resolve()), state, part.start, part.stop)}.json"
    )
    if not known.is_file():
        value = part.sha256()
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, {"sha256": value})
    return str(read_json(known)["sha256"])


def text_place(source: DataConfig, cache: Path) -> Path:
    """The folder that holds the three text files of the source, or its single file."""
    if source.dir:
        place = Path(source.dir).expanduser()
        if not place.exists():
            raise UserError(f"data.dir: no folder {shown(place)}, and no such file")
        return place
    if source.name == "synthetic":
        version = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()
        folder = cache / "text" / f"synthetic-{digest(version, source.seed)}"
        if not folder.is_dir():
            fill_folder(folder, lambda tmp: _generate(source.seed, tmp))
        return folder
    root = os.environ.get("MOGRIFIER_LM_DATA")
    if root and not Path(root).is_dir():
        raise UserError(f"MOGRIFIER_LM_DATA={root}: there is no such folder")
    if root and source.folder and (Path(root) / source.folder).exists():
        return Path(root) / source.folder
    if not source.hub_path:
        below = f" or MOGRIFIER_LM_DATA to hold {source.folder}" if source.folder else ""
        raise UserError(
            f"data={source.name} needs data.dir=FOLDER with train.txt, valid.txt and test.txt, "
            f"data.dir=FILE that is cut into them, or data.hub_path=NAME of the hub{below}"
        )
    hub = (source.hub_path, source.hub_name, source.hub_revision, source.hub_column)
    folder = cache / "text" / f"{source.name}-{digest(*hub)}"
    if not folder.is_dir():
        fill_folder(folder, lambda tmp: _download(source, tmp))
    return folder


def _generate(seed: int, folder: Path) -> None:
    """The synthetic text and, beside it, -ln p of each split under its source."""
    log.info("generating the synthetic language")
    language = synthetic.SyntheticLanguage(seed)
    floors = {}
    for i, split in enumerate(SPLITS):
        size = synthetic.TRAIN_TOKENS if split == "train" else synthetic.EVAL_TOKENS
        lines = language.sample(size, seed=3 * seed + i)
        (folder / f"{split}.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )
        if split != "train":
            floors[split] = language.nats(lines)
    (folder / "floor.json").write_text(json.dumps(floors), encoding="utf-8")


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
