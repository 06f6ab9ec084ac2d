"""Reproduce a table run by run, as far as the time given goes.

python scripts/reproduce.py curve rounds=0,4 epochs=145 minutes=10
python scripts/reproduce.py curve rounds=0,1,2,3,4,5,6 seed=1,2,3     # all of it, without a limit
python scripts/reproduce.py curve rounds=0,4 minutes=4 out=FOLDER data=FOLDER_WITH_TRAIN_TXT
python scripts/reproduce.py rounds seed=1,2,3 processes=8             # this project's, small

curve: PTB's validation perplexity over the rounds, 24 M parameters, windows of 35 steps, 145 epochs
(Melis et al., arXiv 1909.01792), with the settings of experiment=ptb_ablation_24m. The paper tuned
each point for itself; here all share the rates of one.
rounds: the same question with 3 M parameters and 6 epochs (experiment=ptb_3m, tuned alike for the
LSTM and for four rounds), static scores.
rank: the rounds with matrices of rank 40. ablations: of four rounds, one thing changed.
wikitext2, ptb_char: LSTM and four rounds, experiment=wt2_small and ptb_char_small.

Runs are made one after the other, or so many processes side by side, in work (runs/TABLE), each
scored as it ends; then its files but the checkpoints are copied to out, if that is given. Started
again, the same command leaves out what is finished and goes on with what was cut, where its
checkpoint still is. With minutes, the speed is measured first, and no run is started that would not
end in time. device: cuda where there is one; there several processes want NVIDIA's MPS. data: a
folder of the text, for all tables but wikitext2 and ptb_char PTB. overrides are those of train.py,
overrides=[model.num_params=1e5,trainer.threads=1] say.
"""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mogrifier_lm.config import Config, validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script
from mogrifier_lm.launch.explain import EXPECTED, explain
from mogrifier_lm.launch.job import compose, run_in
from mogrifier_lm.reports.table import markdown_table
from mogrifier_lm.runs.folder import RunFolder, Status

log = logging.getLogger(__name__)

PUBLISHED = {0: 57.5, 1: 56.4, 2: 55.5, 3: 54.8, 4: 54.1, 5: 54.3, 6: 54.6}  # rounds → valid
ABLATIONS = {
    "none": [],
    "shared": ["model.share_rounds=true"],
    "no_zigzag": ["model.zigzag=false"],
    "mlstm": ["model.cell=mlstm"],
    "rlstm": ["model.cell=rlstm"],
    "mlstm, no rounds": ["model.cell=mlstm", "model.rounds=0"],
    "rlstm, no rounds": ["model.cell=rlstm", "model.rounds=0"],
}
TUNED_LSTM = "optimizer.lr=0.0035"  # of ptb_3m and wt2_small, whose files say how it was found


def table_runs(table: str, rounds: Sequence[int] | None = None) -> dict[str, list[str]]:
    """Name of each run of a table → its overrides, but for the seed.

    Raises:
        UserError: no such table, or rounds that it does not have.
    """
    if table == "curve":
        # The recipe's 300 validations would take a quarter of the time on a fast card. Each third
        # epoch has one here, and the averaging waits for as many steps without a better one.
        seldom = ["trainer.valid_every=1245", "optimizer.averaging_patience=8"]
        shared = ["experiment=ptb_ablation_24m", "evaluators=[static,dynamic]", *seldom]
        runs = {f"rounds={r}": [*shared, f"model.rounds={r}"] for r in PUBLISHED}
    elif table in ("rounds", "rank"):
        low = ["model.rank=40"] if table == "rank" else []
        runs = {
            f"rounds={r}": [
                "experiment=ptb_3m", f"model.rounds={r}", *([] if r else [TUNED_LSTM]), *low,
            ]
            for r in PUBLISHED
            if r or not low
        }  # fmt: skip
    elif table == "ablations":
        runs = {k: ["experiment=ptb_3m", *changed] for k, changed in ABLATIONS.items()}
    elif table == "wikitext2":
        sized = "experiment=wt2_small"
        runs = {"rounds=0": [sized, "model.rounds=0", TUNED_LSTM], "rounds=4": [sized]}
    elif table == "ptb_char":
        runs = {f"rounds={r}": ["experiment=ptb_char_small", f"model.rounds={r}"] for r in (0, 4)}
    else:
        known = "curve, rounds, rank, ablations, wikitext2, ptb_char"
        raise UserError(f"what is to be reproduced? one of {known}; not {table or 'nothing'}")
    for r in rounds or ():
        if f"rounds={r}" not in runs:
            raise UserError(f"rounds={r}: {table} has {', '.join(runs)}")
    return runs if rounds is None else {f"rounds={r}": runs[f"rounds={r}"] for r in rounds}


def main(
    *what: Path,
    rounds: list[int] | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    seed: list[int] = [1],  # noqa: B006  # read, not changed
    processes: int = 1,
    device: str | None = None,
    precision: str | None = None,
    data: Path | None = None,
    work: Path | None = None,
    out: Path | None = None,
    overrides: list[str] = [],  # noqa: B006
) -> None:
    table = ",".join(str(name) for name in what)
    runs = table_runs(table, rounds)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    import torch

    work = work or Path("runs", table)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.startswith("cuda") else None)
    shared = ["tracker=none", f"trainer.device={device}"]
    shared += [f"trainer.precision={precision}"] if precision else []
    shared += [f"trainer.max_epochs={epochs}"] if epochs else []
    shared += [f"data.dir={data}"] if data else []
    end = None if minutes is None else time.monotonic() + 60 * minutes
    asked = [(f"{name},seed={s}", [*own, f"seed={s}"]) for s in seed for name, own in runs.items()]
    todo = [
        (work / name, [*own, *shared, *overrides], end, out and out / name)
        for name, own in asked
        if not _summary(work / name, out and out / name)
    ]
    if processes == 1:
        for job in todo:
            _train(*job)
            _table(table, asked, work, out)
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for ended in as_completed([pool.submit(_train, *job) for job in todo]):
                ended.result()
                _table(table, asked, work, out)
    print(_table(table, asked, work, out))
    if table == "curve":
        print("paper: validation after 145 epochs, each point tuned (arXiv 1909.01792)")


def _table(table: str, asked: Sequence[Any], work: Path, out: Path | None) -> str:
    """The table of what is finished, which is also written to TABLE.md in the folders."""
    rows = [_row(table, name, _summary(work / name, out and out / name)) for name, _ in asked]
    text = markdown_table(rows)
    for folder in filter(None, (work, out)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{table}.md").write_text(text, encoding="utf-8")
    return f"\n{text}"


def _summary(*folders: Path | None) -> dict[str, Any]:
    """That of a finished run, from the first folder that has one; {} where there is none."""
    for folder in filter(None, folders):
        summary = RunFolder(folder).read_summary()
        if summary.get("status") == Status.COMPLETED:
            return summary
    return {}


def _train(path: Path, overrides: list[str], end: float | None, out: Path | None) -> None:
    """Train and score what is left of a run, if it will end in time; a failure leaves its reason.

    Args:
        path: of the run's folder.
        overrides: of train.py.
        end: of the time, on the monotonic clock.
        out: where its files are kept.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.argv = ["train.py", *overrides]  # the command that provenance.json names
    log.info("\n%s", path)
    folder, node = RunFolder(path), compose(overrides)
    if end is not None and time.monotonic() > end:
        log.info("no time is left: not started")
        return
    if end is not None:
        needed = _seconds(validate(node), folder)
        left = end - time.monotonic()
        words = f"about {needed / 60:.1f} minutes are needed, {left / 60:.1f} left"
        log.info("%s%s", words, "" if needed <= left else ": not started")
        if needed > left:
            return
    try:
        with folder.locked():
            run_in(node, folder, overrides, in_sweep=True)
    except EXPECTED as error:
        log.warning("failed: %s", explain(error))
    if out and _summary(path):
        _keep(path, out)


def _seconds(config: Config, folder: RunFolder) -> float:
    """What the rest of a run takes here."""
    from mogrifier_lm.launch.speed import (
        scoring_seconds,
        trainer_on_random_tokens,
        training_speed,
        validation_seconds,
    )
    from mogrifier_lm.runs.build import build_corpus, check_device, use_threads
    from mogrifier_lm.texts.fetch import fetch
    from mogrifier_lm.training import checkpoint

    use_threads(config.trainer.threads)
    fetch(config.data)
    corpus = build_corpus(config)
    device = check_device(config.trainer.device)
    trainer = trainer_on_random_tokens(config, len(corpus.tokenizer), device)
    rate = training_speed(trainer, 3)
    done = 0
    if folder.last.is_file():
        _, values = checkpoint.load(folder.last)
        done = values["progress"]["tokens"]
    assert config.trainer.max_epochs is not None
    epoch = len(corpus.splits["train"].ids)
    tokens = max(0, config.trainer.max_epochs * epoch - done)
    step = config.trainer.batch_size * config.trainer.bptt
    validation = validation_seconds(config, trainer.model, corpus)
    validations = tokens / (step * (config.trainer.valid_every or epoch / step))
    scoring = scoring_seconds(config, trainer.model, corpus, 1000)
    log.info(
        "%.0f tokens/s; a validation takes %.2f s, scoring %.0f s",
        rate, validation, scoring,
    )  # fmt: skip
    return tokens / rate + validations * validation + scoring


def _keep(folder: Path, out: Path) -> None:
    """Copy the files of a finished run, but not its weights, which lie in folders of their own."""
    for file in folder.glob("[!.]*"):
        if file.is_file():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, out)


def _row(table: str, name: str, summary: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": name}
    row["epochs"] = f"{summary['epochs']:.0f}" if summary else ""
    row["minutes"] = f"{summary['seconds'] / 60:.1f}" if summary else ""
    row["parameters"] = f"{summary['params']:,}" if summary else ""
    if table == "curve":
        row["paper, valid"] = PUBLISHED[int(name.partition(",")[0].removeprefix("rounds="))]
    unit, digits = ("bits_per_character", 4) if table == "ptb_char" else ("ppl", 2)
    for evaluator in ("static", "dynamic") if table == "curve" else ("static",):
        for split in ("valid", "test"):
            found = summary.get(split, {}).get(evaluator)
            row[f"{split}, {evaluator}"] = f"{found[unit]:.{digits}f}" if found else ""
    return row


command = partial(script, main, "; the same command goes on from there")
