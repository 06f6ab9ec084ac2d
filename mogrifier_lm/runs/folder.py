"""The folder of a run, which this module alone owns: its files, status, lock, and what they say.

Every file in it is written whole or not at all, but for the two that grow line by line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import MAX_JSON, ORPHANS, check_shape, parse_json, read_json, write_json
from mogrifier_lm.terminal import shown

MULTIRUN = "multirun.yaml"
"""In the folder of a sweep: its command, written by Hydra before the first run."""
REPORT = "report"
"""The folder, in that of a sweep or a search, where its report lies."""


# What these files hold at the least, in whatever version: see `files.read_json`.
NUMBER = int | float
SCORE = dict.fromkeys("bits_per_byte nats tokens words bytes".split(), NUMBER)
SCORE |= dict.fromkeys(("ppl", "token_ppl"), NUMBER | None)  # null where it is infinite
FACTS = dict.fromkeys("params hidden_size epochs tokens seconds tokens_per_second".split(), NUMBER)
SUMMARY = FACTS | dict.fromkeys(("valid", "test"), {str: (NUMBER, SCORE)})
DATA = {"name": str, "sha256": dict.fromkeys(("train", "valid", "test"), str)}
PROVENANCE = {"data": DATA, "git": dict | None, "versions": dict | None, "command": list | None}


class Status(StrEnum):
    """How a run stands, as summary.json says; of one without that file nobody has said."""

    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    PRUNED = "pruned"  # given up by a search
    UNFINISHED = "unfinished"  # no summary.json: it is at work, or was killed


class RunFolder:
    """The folder of a run and its files, which need not be there.

    Attributes:
        path: of the folder.
        config: the resolved config; with it the run has begun.
        overrides: key → value of the command line: what tells the run from others of its sweep.
        provenance: code, versions, machine, kernels, data.
        tokenizer: of its text; sentencepiece's own model lies beside it.
        metrics: one object a line for each event of training.
        summary: how it ended, and its scores.
        tuning: what evaluators have tried.
        best: the best weights by validation perplexity.
        last: the last checkpoint: all that training depends on.
        previous: the one before, for where the last is damaged.
        curves: a plot of the metrics.
        log: what the run says, and tracebacks.
        counts: of each word in the training text, in an exported folder.
        statistics: of gradients on the training text, in an exported folder.
        wandb: W&B's id of the run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.overrides = self.path / "overrides.json"
        self.provenance = self.path / "provenance.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.tuning = self.path / "tuning.json"
        self.best = self.path / "checkpoints" / "best" / "model.safetensors"
        self.last = self.path / "checkpoints" / "last" / "state.safetensors"
        self.previous = self.last.with_name("previous.safetensors")
        self.curves = self.path / "curves.png"
        self.log = self.path / "train.log"
        self.counts = self.path / "counts.json"
        self.statistics = self.path / "statistics.safetensors"
        self.wandb = self.path / "wandb.json"

    def __str__(self) -> str:
        return str(shown(self.path))

    def is_run(self) -> bool:
        """Whether a run has left anything here."""
        return any(file.is_file() for file in (self.overrides, self.summary, self.config))

    def has_begun(self) -> bool:
        """Whether there is a run to go on with."""
        return self.config.is_file()

    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.last.is_file() or self.previous.is_file()

    def has_trained(self) -> bool:
        """Whether there are checkpoints or results, which no other run may take."""
        return self.can_resume() or self.best.is_file() or self.is_completed()

    def is_completed(self) -> bool:
        """Whether it has its results, which only better ones may replace."""
        return self.read_summary().get("status") == Status.COMPLETED

    def sweep(self) -> Path | None:
        """The folder of the sweep that the run is of; None where it is of none."""
        parent = self.path.resolve().parent
        return parent if (parent / MULTIRUN).is_file() else None

    def model_files(self) -> list[Path]:
        """What `load_model` and a reader of scores need of the folder, as names in it."""
        model = self.tokenizer.with_suffix(".model")
        wanted = (self.config, self.tokenizer, model, self.best, self.summary)
        return [file.relative_to(self.path) for file in wanted if file.is_file()]

    def read_summary(self) -> dict[str, Any]:
        """What summary.json holds; {} where there is none.

        Raises:
            UserError: it is damaged.
        """
        summary = read_json(self.summary)
        whole = summary.get("status") == Status.COMPLETED
        shape = {key: part for key, part in SUMMARY.items() if whole or key in summary}
        check_shape(summary, shape, self.summary)
        return summary

    def read_provenance(self, required: bool = False) -> dict[str, Any]:
        """What provenance.json holds; {} where there is none, which may be an error.

        Raises:
            UserError: it is damaged, or `required` and not there.
        """
        return read_json(self.provenance, PROVENANCE, required)

    def end(self, status: Status, error: str, **values: Any) -> None:
        """Write how a run ended that has not completed."""
        write_json(self.summary, {"status": status, "error": error, **values})

    def rows(self, with_key: str = "") -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl, those with a key if one is given.

        A row is an object of numbers, its tokens among them. A line that is not whole, as
        the last of a run at work or of one that was killed, is none.
        """
        if not self.metrics.is_file():
            return
        with open(self.metrics, "rb") as file:
            while line := file.readline(MAX_JSON):
                if with_key.encode() in line:
                    try:
                        row = parse_json(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(row, dict) and {"tokens", with_key or "tokens"} <= row.keys():
                        if all(isinstance(value, NUMBER) for value in row.values()):
                            yield row

    @contextmanager
    def locked(self, wait: bool = False) -> Iterator[None]:
        """As `locked`; what killed writers have left is removed first."""
        with locked(self.path, wait):
            for folder in (self.path, self.best.parent, self.last.parent):
                for orphan in folder.glob(ORPHANS):
                    orphan.unlink(missing_ok=True)
            yield


def check_inside(folder: Path) -> None:
    """Refuse a folder through which one would write, or wait, elsewhere.

    Raises:
        UserError: with the link that leads out of it, or what is neither a file nor a folder.
    """
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        if os.path.basename(parent) == "wandb":  # a new run of W&B's own links to its log elsewhere
            folders[:] = [x for x in folders if Path(parent, x).is_symlink() or "run-" not in x]
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(
                    f"{shown(path)} is a link out of the folder: put a copy in its place"
                )
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{shown(path)} is neither a file nor a folder: remove it")


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which one process at a time may write to; ends with the process at latest.

    Args:
        folder: is made if it is not there.
        wait: until it is free.

    Raises:
        UserError: another process holds it, and `wait` is false; it cannot be written to.
    """
    check_inside(folder)
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is at work in {shown(folder)}: wait for its end, or end it"
        ) from None
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be written to ({error.strerror}): take a copy of it"
        ) from error
    try:
        yield
    finally:
        lock.release()
