"""What no one would type, in every place where something is read: each case ends in one line.

    python scripts/fuzz.py                          # 200 cases, of which a fifth trains or loads
    python scripts/fuzz.py cases=10000 seed=7       # hours of one core
    python scripts/fuzz.py first=1234 cases=1 seed=7    # one of them again

A case is made from its number and the seed alone. It passes where it ends by itself, with a finite
result or with one line for the user: no traceback, no crash, no more than 20 s, no more than 1 GB
of memory over what was asked for. Cases run in child processes, many in one, since the import of
torch takes longer than they do; one that takes too long is tried once more, since the machine may
be busy. What did not pass is printed, and the exit status is 1.
"""

import contextlib
import dataclasses
import gc
import io
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mogrifier_lm.config import Config, load_config, save_config, validate
from mogrifier_lm.launch.cli import guarded, script
from mogrifier_lm.launch.explain import schema_of
from mogrifier_lm.launch.job import compose
from mogrifier_lm.runs.folder import RunFolder

FORK = multiprocessing.get_context("fork")
SECONDS, MEMORY = 20, 10**9  # that a case may take
# Memory of a training as the program reckons it at the least → what it takes, with a step's passing
# values and the copy of the best weights.
ASKED = 2.5
STRANGE = [
    "null", "nan", "inf", "-inf", "true", "", "''", "[]", "{}", "[[1]]", "{a:1}", "[null]", "???",
    "0", "-0.0", "-1", "1e-300", "1e300", "1e400", "4294967296", "9" * 30, "0x10", "1_000", "abc",
    "'a b'", "../..", "/dev/null", "'\x1b[2J'", "'é\u202e'", "${seed}", "${oc.env:NONE}", "'${'",
]  # fmt: skip
HUGE = ["100000", "10000000", "1000000000000", "1e18", "99999999999999999999"]


def keys(schema: type = Config, path: str = "") -> dict[str, Any]:
    """Dotted key → field and type of every option."""
    found = {}
    for field in dataclasses.fields(schema):
        hint = get_type_hints(schema)[field.name]
        if nested := schema_of(hint):
            found |= keys(nested, f"{path}{field.name}.")
        else:
            found[f"{path}{field.name}"] = (field, hint)
    return found


# Where a run goes and what it says to others is not fuzzed; nor how long it goes on.
FIXED = ("debug", "resume", "tracker.", "trainer.max_", "trainer.device", "data.", "trainer.init_")
KEYS = keys()
SIZES = ("model.", "trainer.b", "trainer.valid_b", "regularization.samples", "evaluators.static.b")
TRAINED = [key for key in KEYS if not key.startswith(FIXED)]


def in_range(key: str, r: random.Random, huge: bool = False) -> str:
    """A value that the schema takes; of a size one that is small, unless `huge`."""
    field, hint = KEYS[key]
    values, types = field.metadata["values"], {hint, *get_args(hint), *get_args(get_args(hint)[:1])}
    if isinstance(values, tuple):
        return str(r.choice(values))
    if bool in types:
        return r.choice(["true", "false"])
    if not types & {int, float}:
        return r.choice(["auto", "reference", "lstm", "x"])
    low, high = max(values.least, values.above + 1e-12), min(values.most, values.below - 1e-12)
    if int in types:
        small = 3 if key.endswith(("rounds", "layers", "samples", "mixture", "passes")) else 24
        return str(int(r.randint(int(low), int(min(high, low + small))) if not huge else high))
    value = high if huge else r.choice([low, high, r.uniform(low, min(1, high)), 0.5])
    return f"[{value:g}]" if "list" in str(hint) else repr(float(min(max(value, low), high)))


def base(home: Path) -> list[str]:
    """A run of a second."""
    return [
        "data=text", f"data.dir={home}/text", f"data.cache_dir={home}/cache", "tracker=none",
        "model.hidden_size=6", "trainer.batch_size=4", "trainer.bptt=7", "trainer.max_steps=3",
        "trainer.max_epochs=null", "evaluators.static.batch_size=8",
    ]  # fmt: skip


def of_run(overrides: list[str], folder: Path) -> None:
    from mogrifier_lm.runs.run import run

    config = validate(compose(overrides))
    folder.mkdir(exist_ok=True)
    save_config(config, RunFolder(folder).config)
    expect_finite(run(config, RunFolder(folder)))


def expect_finite(summary: dict[str, Any]) -> None:
    for split in ("valid", "test"):
        for name, score in summary[split].items():
            if isinstance(score, dict) and not math.isfinite(score["ppl"]):
                print(f"not finite: {split} {name}")


# -- what is done: each takes the home of the fuzzing, an empty folder and the source of chance ----


def overrides(home: Path, folder: Path, r: random.Random) -> None:
    given = []
    for key in r.choices(list(KEYS), k=r.randint(1, 4)):
        key = r.choice([key, key.rpartition(".")[0] or key, key + "x"]) if r.random() < 0.2 else key
        value = r.choice(STRANGE) if r.random() < 0.7 or key not in KEYS else in_range(key, r)
        given.append(f"{r.choice(['', '', '', '+', '~', '++'])}{key}={value}")
    validate(compose([*base(home), "evaluators=[static,dynamic,cache]", *given]))


def damaged(raw: bytes, r: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled or put in."""
    data = bytearray(raw)
    for _ in range(r.randint(1, 4)):
        at = r.randrange(len(data) + 1)
        how = r.randrange(5)
        if how == 0:
            del data[at : at + r.choice([1, 10, len(data)])]
        elif how == 1:
            data[at:at] = data[at : at + r.choice([1, 30])]
        elif how == 2:
            data[at:at] = r.choice(STRANGE).encode()
        elif how == 3:
            data[at:at] = r.choice([b"[", b"{", b'{"a":', b"- "]) * r.choice([1, 30, 20_000])
        elif data:
            data[min(at, len(data) - 1)] ^= 1 << r.randrange(8)
    return bytes(data)


def strange_value(value: Any, r: random.Random) -> Any:
    """A value of a file with one part of it replaced."""
    if r.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return r.choice([None, 5, -1.5, 1e300, "x", "\x1b[31m", [], {}, [[]], True, "=1+1", "<b>"])
    at = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at] = strange_value(value[at], r)  # type: ignore[index]
    return copy


def a_copy(home: Path, folder: Path) -> Path:
    return Path(shutil.copytree(home / "sweep", folder / "sweep")) / "0"


def damage(path: Path, r: random.Random) -> None:
    """One file, by its bytes or by its values."""
    if path.suffix == ".json" and r.random() < 0.6:
        value = strange_value(json.loads(path.read_text(encoding="utf-8")), r)
        path.write_text(json.dumps(value), encoding="utf-8")
    else:
        path.write_bytes(damaged(path.read_bytes(), r))


def saved_config(home: Path, folder: Path, r: random.Random) -> None:
    import yaml

    run = a_copy(home, folder)
    path = RunFolder(run).config
    if r.random() < 0.5:
        value = strange_value(yaml.safe_load(path.read_text(encoding="utf-8")), r)
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
    else:
        damage(path, r)
    load_config(path)


def report(home: Path, folder: Path, r: random.Random) -> None:
    from mogrifier_lm.reports.folders import read_runs
    from mogrifier_lm.reports.page import page
    from mogrifier_lm.reports.report import write_report

    run = a_copy(home, folder)
    files = RunFolder(run)
    damage(r.choice([files.summary, files.overrides, files.provenance, files.metrics]), r)
    runs = read_runs([run.parent])
    write_report(runs, folder / "report")
    page(runs, "fuzz")


def text(home: Path, folder: Path, r: random.Random) -> None:
    from mogrifier_lm.data import load_corpus
    from mogrifier_lm.data.corpus import DataConfig

    shutil.copytree(home / "text", folder / "text")
    path = folder / "text" / f"{r.choice(['train', 'valid', 'test'])}.txt"
    path.write_bytes(damaged(path.read_bytes()[: r.choice([0, 10, 2000])], r))
    load_corpus(DataConfig(name="text", dir=str(folder / "text"), cache_dir=str(folder)))


def sizes(home: Path, folder: Path, r: random.Random) -> None:
    size = [k for k in KEYS if k.startswith(SIZES) and KEYS[k][1] not in (bool, str)]
    given = [f"{key}={r.choice(HUGE)}" for key in r.sample(size, k=r.randint(1, 2))]
    given += ["model.hidden_size=null"] if any("num_params" in g for g in given) else []
    of_run([*base(home), *given], folder / "run")


def checkpoint(home: Path, folder: Path, r: random.Random) -> None:
    from mogrifier_lm import load_model

    run = a_copy(home, folder)
    files = RunFolder(run)
    damage(r.choice([files.best, files.tokenizer, files.config]), r)
    load_model(run).zero_states(1)


def strange_state(path: Path, r: random.Random) -> None:
    """A checkpoint that is whole, with one tensor or one value of another kind."""
    from mogrifier_lm.training import checkpoint

    tensors, values = checkpoint.load(path)
    name = r.choice(list(tensors))
    if r.random() < 0.5:
        tensors[name] = r.choice(
            [tensors[name].flatten()[:1], tensors[name].double(), tensors[name].int(),
             tensors[name] * float("nan"), tensors[name][None]]
        )  # fmt: skip
    else:
        values = {key: strange_value(value, r) for key, value in values.items()}
    checkpoint.save(path, tensors, values)


def resumed(home: Path, folder: Path, r: random.Random) -> None:
    from mogrifier_lm.runs.run import run as go_on

    files = RunFolder(a_copy(home, folder))
    if r.random() < 0.5:
        strange_state(files.last, r)
    else:
        damage(r.choice([files.last, files.metrics, files.provenance]), r)
    config = load_config(files.config)
    config.data.cache_dir = str(home / "cache")
    config.trainer.max_steps = 5
    expect_finite(go_on(config, files))


def trained(home: Path, folder: Path, r: random.Random) -> None:
    given = [f"{key}={in_range(key, r)}" for key in r.sample(TRAINED, k=r.randint(1, 6))]
    names = sorted({g.split(".")[1] for g in given if g.startswith("evaluators.")} | {"static"})
    of_run([*base(home), f"evaluators=[{','.join(names)}]", *given], folder / "run")


Case = Callable[[Path, Path, random.Random], None]
LIGHT: list[Case] = [overrides, overrides, overrides, saved_config, report, text, sizes]
HEAVY: list[Case] = [trained, trained, checkpoint, resumed]


def chosen(number: int, seed: int) -> tuple[Case, random.Random]:
    """What a case does, and the source of its chance."""
    r = random.Random(f"{seed}/{number}")
    return r.choice(LIGHT if number % 5 else HEAVY), r


def one(number: int, seed: int, home: Path) -> tuple[str, str]:
    """The name of a case, and what is wrong with how it ended; "" where nothing is."""
    case, r = chosen(number, seed)
    said, stream = io.StringIO(), logging.StreamHandler(said_log := io.StringIO())
    logging.getLogger().addHandler(stream)
    try:
        with (
            tempfile.TemporaryDirectory(dir=home) as folder,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            guarded(lambda: case(home, Path(folder), r))
    except SystemExit:
        line = said.getvalue().strip().splitlines()[-1:]
        if not line or not line[0].startswith("error: ") or len(line[0]) < 15:
            return case.__name__, f"it ended without a line that says why: {line}"
        return f"{case.__name__} refused", ""
    except BaseException:
        return case.__name__, traceback.format_exc(limit=-3)
    finally:
        logging.getLogger().removeHandler(stream)
    if "not finite" in said.getvalue() and "is not finite" not in said_log.getvalue():
        return case.__name__, said.getvalue()
    return case.__name__, ""


def serve(pipe: Connection, seed: int, home: Path) -> None:
    """In a child: do the cases whose numbers come, until none does."""
    os.environ["TQDM_DISABLE"] = "1"
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # plots take longer than all else
    import torch

    from mogrifier_lm.runs import build, run  # imports are not measured with the first case

    asked, check = [0], build.check_memory

    def noted(size: int, what: str, device: str) -> None:
        check(size, what, device)
        asked.append(size)

    build.check_memory = noted
    assert run
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        torch.set_num_threads(1)
        asked[1:] = []
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak, from here on
        before = peak_memory()
        name, wrong = one(number, seed, home)
        if not wrong and (taken := peak_memory() - before) > MEMORY + ASKED * max(asked):
            wrong = f"it took {taken:,} bytes, {max(asked):,} were asked for"
        pipe.send((name, wrong))


def peak_memory() -> int:
    """The most bytes that this process has had since the peak was cleared."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Child:
    """A process that does cases, one after the other."""

    def __init__(self, seed: int, home: Path) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(theirs, seed, home), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def does(self, number: int) -> tuple[str, ...] | None:
        """The name of a case and what is wrong; None where it does not end in time."""
        self.pipe.send(number)
        if not self.pipe.poll(SECONDS):
            return None
        try:
            return tuple(self.pipe.recv())
        except EOFError:
            self.process.join()
            return "?", f"it crashed, exit code {self.process.exitcode}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def prepare(home: Path) -> None:
    """The text, and a sweep of one run, that cases damage copies of."""
    from mogrifier_lm.files import write_json
    from mogrifier_lm.texts.synthetic import SyntheticLanguage

    (home / "text").mkdir()
    language = SyntheticLanguage(seed=1)
    for i, (split, size) in enumerate((("train", 1500), ("valid", 200), ("test", 200))):
        text = "".join(f"{line}\n" for line in language.sample(size, seed=i))
        (home / "text" / f"{split}.txt").write_text(text, encoding="utf-8")
    (home / "sweep").mkdir()
    of_run([*base(home), "trainer.log_every=1"], home / "sweep" / "0")
    write_json(RunFolder(home / "sweep/0").overrides, {"model.rounds": "5", "seed": "1"})


def main(*, cases: int = 200, seed: int = 1, first: int = 0) -> None:
    failures, counts, began = [], Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        setup = FORK.Process(target=prepare, args=(home,))  # this process stays without torch
        setup.start()
        setup.join()
        child = Child(seed, home)
        for number in range(first, first + cases):
            if (done := child.does(number)) is None:
                child.end()
                child = Child(seed, home)
                done = child.does(number) or ("?", f"no end after {SECONDS} s, twice")
            wrong, name = done[1], chosen(number, seed)[0].__name__
            counts[f"{name} refused" if done[0].endswith("refused") else name] += 1
            if wrong:
                failures.append(f"case {number} ({name}): {wrong}")
                print(failures[-1], flush=True)
                child.end()
                child = Child(seed, home)
        child.end()
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{sum(counts.values())} cases in {time.monotonic() - began:.0f} s: {told}")
    print(f"{len(failures)} did not pass")
    sys.exit(bool(failures))


if __name__ == "__main__":
    script(main)
