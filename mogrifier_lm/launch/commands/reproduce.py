"""Reproduce a published curve run by run, as far as the time given goes.

python scripts/reproduce.py curve rounds=0,4 epochs=145 minutes=10
python scripts/reproduce.py curve rounds=0,1,2,3,4,5,6 seed=1,2,3     # all of it, without a limit
python scripts/reproduce.py curve rounds=0,4 minutes=4 out=FOLDER data=FOLDER_WITH_TRAIN_TXT

curve: PTB's validation perplexity over the rounds, 24 M parameters, windows of 35 steps, 145 epochs
(Melis et al., arXiv 1909.01792), with the settings of experiment=ptb_ablation_24m. The paper tuned
each point for itself; here all share the rates of one.

Runs are made one after the other in work (runs/curve), each scored statically at a tuned
temperature and dynamically as it ends; then its files but the checkpoints are copied to out, if
that is given. Started again, the same command leaves out what is finished and goes on with what was
cut, where its checkpoint still is. With minutes, the speed is measured first, and no run is started
that would not end in time. device: cuda where there is one. overrides are those of train.py,
overrides=[model.num_params=1e5,trainer.threads=1] say.
"""

import logging
import shutil
import sys
import time
from functools import partial
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


def main(
    *what: Path,
    rounds: list[int] = list(PUBLISHED),  # noqa: B006  # read, not changed
    epochs: int = 145,
    minutes: float | None = None,
    seed: list[int] = [1],  # noqa: B006
    device: str | None = None,
    precision: str | None = None,
    data: Path | None = None,
    work: Path = Path("runs/curve"),
    out: Path | None = None,
    overrides: list[str] = [],  # noqa: B006
) -> None:
    if [str(name) for name in what] != ["curve"]:
        raise UserError("what is to be reproduced? curve: python scripts/reproduce.py curve")
    if unknown := set(rounds) - set(PUBLISHED):
        raise UserError(f"rounds={min(unknown)}: the published curve has 0 to {max(PUBLISHED)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.startswith("cuda") else "fp32")
    shared = ["experiment=ptb_ablation_24m", f"trainer.max_epochs={epochs}", "tracker=none"]
    shared += ["evaluators=[static,dynamic]", f"trainer.device={device}"]
    shared += [f"trainer.precision={precision}"]
    shared += [f"data.dir={data}"] if data else []
    end = None if minutes is None else time.monotonic() + 60 * minutes
    rows = []
    for s in seed:
        for r in rounds:
            own = [*shared, *overrides, f"model.rounds={r}", f"seed={s}"]
            name = f"rounds={r},seed={s}"
            summary = _summary(work / name, out and out / name)
            if not summary:
                log.info("\n%s", name)
                _train(RunFolder(work / name), own, end)
                summary = _summary(work / name, None)
            if summary and out:
                _keep(work / name, out / name)
            rows.append(_row(r, s, summary))
            table = markdown_table(rows)
            for folder in filter(None, (work, out)):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "curve.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\npaper: validation after 145 epochs, each point tuned (arXiv 1909.01792)")


def _summary(*folders: Path | None) -> dict[str, Any]:
    """That of a finished run, from the first folder that has one; {} where there is none."""
    for folder in filter(None, folders):
        summary = RunFolder(folder).read_summary()
        if summary.get("status") == Status.COMPLETED:
            return summary
    return {}


def _train(folder: RunFolder, overrides: list[str], end: float | None) -> None:
    """Train and score what is left of a run, if it will end in time; a failure leaves its reason.

    Args:
        folder: of the run.
        overrides: of train.py.
        end: of the time, on the monotonic clock.
    """
    node = compose(overrides)
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


def _row(rounds: int, seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    def ppl(split: str, evaluator: str) -> str:
        found = summary.get(split, {}).get(evaluator)
        return f"{found['ppl']:.2f}" if found else ""

    return {
        "rounds": rounds,
        "seed": seed,
        "epochs": f"{summary['epochs']:.0f}" if summary else "",
        "minutes": f"{summary['seconds'] / 60:.1f}" if summary else "",
        "paper, valid": PUBLISHED[rounds],
        "valid": ppl("valid", "static"),
        "test": ppl("test", "static"),
        "valid, dynamic": ppl("valid", "dynamic"),
        "test, dynamic": ppl("test", "dynamic"),
    }


command = partial(script, main, "; the same command goes on from there")
