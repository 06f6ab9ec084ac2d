"""Where texts lie: in a folder, in one file, or in the cache, where `texts.fetch` puts them."""

import gzip
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mogrifier_lm.data.text import CHUNK
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import cache_folder, digest
from mogrifier_lm.options import DataConfig
from mogrifier_lm.terminal import shown

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
NAMES = {"train": ("train",), "valid": ("valid", "val", "dev", "validation"), "test": ("test",)}
PATTERNS = ("{}.txt", "{}.tokens", "ptb.{}.txt", "wiki.{}.tokens")  # ours, then of the releases
SPELLED_PATTERNS = ("ptb.char.{}.txt", "{}.txt")

SYNTHETIC = "synthetic"  # the data set whose text is generated
SYNTHETIC_FORMAT = 1  # raised when the same seed gives another text


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


def cache_of(source: DataConfig) -> Path:
    """The folder where fetched texts and arrays of tokens are kept."""
    return Path(os.path.expanduser(source.cache_dir)) if source.cache_dir else cache_folder()


def text_place(source: DataConfig) -> Path:
    """The folder that holds the three text files of the source, or its single file.

    Raises:
        UserError: it is not there.
    """
    place = local_place(source) or fetched_place(source)
    if place.exists():
        return place
    if source.hub_path or source.name == SYNTHETIC:
        raise UserError(
            f"the text of data={source.name} is not here yet: scripts/prepare_data.py fetches it"
        )
    below = f" or MOGRIFIER_LM_DATA to hold {source.folder}" if source.folder else ""
    raise UserError(
        f"data={source.name} needs data.dir=FOLDER with train.txt, valid.txt and test.txt, "
        f"data.dir=FILE that is cut into them, or data.hub_path=NAME of the hub{below}"
    )


def local_place(source: DataConfig) -> Path | None:
    """Where the user has the text: in `dir`, or below $MOGRIFIER_LM_DATA; None: it is fetched."""
    if source.dir:
        place = Path(os.path.expanduser(source.dir))
        if not place.exists():
            raise UserError(f"data.dir: no folder {shown(place)}, and no such file")
        return place
    root = os.environ.get("MOGRIFIER_LM_DATA")
    if not (root and source.folder):
        return None
    if not Path(root).is_dir():
        raise UserError(f"MOGRIFIER_LM_DATA={root}: there is no such folder")
    place = Path(root) / source.folder
    return place if place.exists() else None


def fetched_place(source: DataConfig) -> Path:
    """The folder that `texts.fetch` fills: what the text depends on is in its name."""
    of_hub = (source.hub_path, source.hub_name, source.hub_revision, source.hub_column)
    key = (SYNTHETIC_FORMAT, source.seed) if source.name == SYNTHETIC else of_hub
    return cache_of(source) / "text" / f"{source.name}-{digest(*key)}"
