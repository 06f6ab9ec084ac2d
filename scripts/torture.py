"""Kills runs, sweeps and evaluations at every event of a file and at random moments of the program.

    python scripts/torture.py                        300 random kills, and one at every file event
    python scripts/torture.py kills=20 events=40     fewer: events=N takes N of them, evenly spread
    python scripts/torture.py seed=2 out=FOLDER      other cases; the folders are kept there

What is killed goes on as a user would make it go on: by resume= if it has begun, else by the same
command, until it ends. Then all that it has left has to be what it leaves without a kill, bit for
bit: scores, the log of metrics but for the clock, and the tensors of both checkpoints. A random
moment is the n-th call of a function, so that a seed says what is done at any pace.

Each case is a process forked from this one, which has imported everything: a second, not five.
"""

import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogrifier_lm.launch.cli import script
from mogrifier_lm.runs.folder import RunFolder

# What holds state of its own between steps, or writes files of its own.
CHOICES: dict[str, Sequence[str]] = {
    "model.cell": ("lstm", "rlstm", "mlstm"),
    "model.rounds": ("0", "2"),
    "model.mixture": ("1", "2"),
    "optimizer.name": ("sgd", "adam", "adamw", "radam"),
    "optimizer.averaging": ("none", "nt_asgd", "tail", "ema", "two_tailed"),
    "optimizer.averaging_patience": ("1", "2"),
    "trainer.precision": ("fp32", "bf16"),
    "trainer.variable_bptt": ("false", "true"),
    "trainer.streams": ("columns", "read_heads"),
    "trainer.checkpoint_minutes": ("0", "5"),
    "trainer.lr_drop": ("1", "0.5"),
    "trainer.lr_on_divergence": ("null", "0.7"),
    "trainer.clip": ("null", "0.3"),
    "regularization.samples": ("1", "2"),
    "regularization.reset_state": ("0", "0.2"),
    "regularization.weight_dropout": ("0", "0.3"),
    "regularization.per_step": ("false", "true"),
    "tokenizer": ("word", "sentencepiece", "char"),
    "evaluators": ("[static]", "[static,rounds]"),
}
STEPS = ("trainer.max_steps=12", "trainer.max_epochs=null", "trainer.valid_every=3")
# What depends on the clock; the length of the log does by the digits of its seconds.
CLOCK = ("seconds", "tokens_per_second", "train/tokens_per_second", "pause_seconds",
         "metrics_bytes")  # fmt: skip


def main(
    *, kills: int = 300, events: int | None = None, seed: int = 1, out: Path | None = None
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="torture-")) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    _prepare(folder)
    counts: Counter[str] = Counter()
    differ = []
    for what, kill in _plan(folder, kills, events, random.Random(seed)):
        counts[what] += 1
        if difference := kill():
            differ.append(f"{what}: {difference}")
            print(f"DIFFERENT {differ[-1]}", flush=True)
    for what, count in counts.items():
        bad = sum(line.startswith(f"{what}:") for line in differ)
        print(f"{what}: {count} kills, {count - bad} as without a kill", flush=True)
    if out is None and not differ:
        shutil.rmtree(folder)
    if differ:
        print(f"the folders are in {folder}")
        sys.exit(1)


def _prepare(folder: Path) -> None:
    """A text, and all imports: a process that is forked does neither again."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # plots take longer than training
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    import torch._dynamo  # as optimizers do, when they are made

    import mogrifier_lm.launch.commands.evaluate
    import mogrifier_lm.runs.run
    from mogrifier_lm.texts.synthetic import SyntheticLanguage

    assert torch._dynamo and mogrifier_lm.runs.run and mogrifier_lm.launch.commands.evaluate
    language, text = SyntheticLanguage(seed=1, vocab_size=200), folder / "text"
    text.mkdir(exist_ok=True)
    for i, (split, size) in enumerate({"train": 900, "valid": 150, "test": 150}.items()):
        lines = language.sample(size, seed=i)
        (text / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass
class Case:
    """A command, and how it goes on once it was killed.

    Attributes:
        name: of its folders.
        arguments: of train.py, or of evaluate.py if `before` is given.
        folder: where all cases lie.
        before: a completed run to begin with.
    """

    name: str
    arguments: Sequence[str]
    folder: Path
    before: Path | None = None

    @property
    def is_sweep(self) -> bool:
        return self.arguments[0] == "-m"

    def whole(self) -> Path:
        """The folder of the command that nobody has killed, which is made once."""
        place = self.folder / f"{self.name}-whole"
        if not place.exists():
            code, _ = self.go(place)
            assert code == 0, f"{self.name} fails by itself: {place}.log"
        return place

    def go(self, place: Path, at: int = 0, of: str = "") -> tuple[int, int]:
        """Give the command, and kill it at an event; returns its exit status and its events.

        Args:
            place: its folder.
            at: number of the event, from 1; 0 for none.
            of: "files" or "calls", which are counted; that of calls takes time.
        """
        if self.before and not place.exists():
            shutil.copytree(self.before, place)
        if self.before:
            arguments = [f"run={place}", *self.arguments]
        elif self.is_sweep:
            arguments = [*self.arguments, f"hydra.sweep.dir={place}"]
        elif RunFolder(place).has_begun():
            arguments = [f"resume={place}"]
        else:
            arguments = [*self.arguments, f"hydra.run.dir={place}"]
        return _forked(arguments, place, bool(self.before), at, of)

    def killed(self, moments: Sequence[int], of: str) -> str:
        """What differs after kills at these moments, one after the other; "" if nothing does."""
        place = self.folder / f"{self.name}-{of}-{'-'.join(map(str, moments))}"
        for at in moments:
            self.go(place, at, of)
        code, _ = self.go(place)
        difference = f"exit status {code}, {place}.log" if code else _differs(self.whole(), place)
        if not difference:
            shutil.rmtree(place)
            place.with_name(f"{place.name}.log").unlink()
        return f"{place.name}: {difference}" if difference else ""


def _forked(
    arguments: Sequence[str], place: Path, evaluating: bool, at: int, of: str
) -> tuple[int, int]:
    """A command in a process of its own, which kills itself at its event number `at`, from 1."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            log = os.open(f"{place}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["train.py", *arguments]
            code = 1
            try:
                count = _counting(at, of, place)
                if evaluating:
                    from mogrifier_lm.launch.commands.evaluate import command as run
                else:
                    from mogrifier_lm.launch.cli import train as run
                run()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            finally:
                sys.setprofile(None)
                os.write(write, struct.pack("q", count()))
        finally:
            os._exit(code)
    os.close(write)
    number = os.read(read, 8)
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, struct.unpack("q", number)[0] if number else 0


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.truncate", "fsync"}


def _counting(at: int, of: str, place: Path) -> Callable[[], int]:
    """Count events, and kill this process at one of them; returns what tells their number."""
    seen = 0

    def event() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS and (name != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if str(arguments[0]).startswith(str(place)):
                event()

    def fsync(descriptor: int) -> None:
        """Only counted: what a killed process has written is kept by the system, flushed or not."""
        if of == "files":
            event()

    os.fsync = fsync  # type: ignore[assignment]
    if of == "files":
        sys.addaudithook(audit)
    elif of == "calls":
        sys.setprofile(lambda *_: event())
    return lambda: seen


def _differs(whole: Path, killed: Path) -> str:
    """What two folders of runs, or of sweeps, do not have in common; "" for nothing."""
    inside = [path.name for path in whole.iterdir() if path.name.isdigit()]  # of a sweep
    for name in inside or ["."]:
        ours, theirs = RunFolder(killed / name), RunFolder(whole / name)
        for file, read in {
            "summary": _json,
            "metrics": _rows,
            "tokenizer": Path.read_bytes,
            "best": _tensors,
            "last": _tensors,
        }.items():
            path = getattr(ours, file)
            if not path.exists():
                return f"{path} is missing"
            if read(path) != read(getattr(theirs, file)):
                return f"{path} is another one"
        if orphans := [*ours.path.rglob("*.tmp")]:
            return f"{orphans[0]} was left behind"
    return ""


def _json(path: Path) -> Any:
    return {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in CLOCK}


def _rows(path: Path) -> Any:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def _tensors(path: Path) -> Any:
    """Names, shapes, types and bytes, and the plain values but for the clock's."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    values = json.loads(header.pop("__metadata__")["values"])
    if "progress" in values:
        values["progress"] = {k: v for k, v in values["progress"].items() if k not in CLOCK}
    return header, values, raw[8 + length :]


def _plan(
    folder: Path, kills: int, events: int | None, chance: random.Random
) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is killed and how, as (kind of kill, what does it and says what differs)."""
    fixed = [
        "data=text", f"data.dir={folder}/text", f"data.cache_dir={folder}/cache", "tracker=none",
        "model.hidden_size=6", "trainer.batch_size=4", "trainer.bptt=7", "trainer.threads=1",
        "trainer.log_every=2", *STEPS,
    ]  # fmt: skip

    def drawn(name: str) -> Case:
        choices = [f"{key}={chance.choice(values)}" for key, values in CHOICES.items()]
        if "tokenizer=sentencepiece" in choices:
            choices.append("tokenizer.vocab_size=300")
        return Case(name, [*fixed, *choices], folder)

    run = Case("all", [*fixed, "trainer.checkpoint_minutes=0", "optimizer.averaging=two_tailed",
                       "optimizer.name=radam", "tokenizer=sentencepiece",
                       "tokenizer.vocab_size=300"], folder)  # fmt: skip
    sweep = Case("sweep", ["-m", *fixed, "model.rounds=0,1", "trainer.max_steps=3"], folder)
    scored = ["evaluators=[static,rounds,dynamic]", "evaluators.dynamic.lr=[1e-3]"]
    evaluation = Case("evaluation", scored, folder, before=run.whole())
    for case in (run, sweep, evaluation):
        case.whole()
        _, number = case.go(folder / "counted", of="files")
        shutil.rmtree(folder / "counted")
        step = 1 if events is None else max(1, 3 * number // events)
        for at in range(1, number + 1, step):
            yield f"{case.name}, at a file event", lambda c=case, n=at: c.killed([n], "files")  # type: ignore[misc]
    done = 0
    while done < kills:
        kind = chance.choice(("run", "run", "run", "sweep", "evaluation"))
        case = drawn(f"drawn{done}") if kind == "run" else sweep if kind == "sweep" else evaluation
        case.whole()
        _, number = case.go(folder / "counted", of="calls")
        shutil.rmtree(folder / "counted")
        for _ in range(min(10, kills - done)):
            moments = [chance.randint(1, number) for _ in range(chance.randint(1, 3))]
            yield f"{kind}, at random moments", lambda c=case, m=moments: c.killed(m, "calls")  # type: ignore[misc]
            done += 1


if __name__ == "__main__":
    script(main)
