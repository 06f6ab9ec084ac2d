"""Searches: spaces, trials in processes of their own, being cut and going on, the report."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch import cli
from mogrifier_lm.launch.commands import report as report_command
from mogrifier_lm.launch.commands import search as search_command
from mogrifier_lm.launch.explain import EXPECTED, explain
from mogrifier_lm.reports.folders import STUDY, read_runs
from mogrifier_lm.reports.page import page
from mogrifier_lm.reports.report import write_report
from mogrifier_lm.reports.trials import NAME, importances, storage
from mogrifier_lm.runs.folder import RunFolder, locked
from mogrifier_lm.search.ranges import SPACES, Range, read_space
from mogrifier_lm.search.search import Search, TrialRun
from tests.conftest import ROOT, table_rows
from tests.reports.test_sweep import make_run

SPACE = """
optimizer.lr: {low: 1e-3, high: 1e-2, log: true}
model.rounds: {low: 0, high: 3}
model.rank: {low: 1, high: 8, or_null: true}
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Search]:
    def make(*overrides: str, space: str = SPACE, **settings: Any) -> Search:
        path = tmp_path / "space.yaml"
        path.write_text(space)
        defaults = {"trials": 4, "jobs": 1, "startup": 2, "warmup": 1, "sampler_seed": 0}
        return Search(
            overrides=overrides,
            dir=tmp_path / "search",
            space=str(path),
            **(defaults | settings),
        )

    return make


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=storage(folder / STUDY))


# The search itself looks, each time that it asks whether its run has ended: no clock decides
# whether the cut comes in time.
CUT = """
import os, signal, sys
from mogrifier_lm.launch.commands.search import command
from mogrifier_lm.search.search import TrialRun

how, name, lines = int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
ended = TrialRun.ended

def cut(run):
    path = run.folder.path / name
    if path.exists() and len(path.read_text().splitlines()) > lines:
        os.kill(os.getpid(), how)
    return ended(run)

TrialRun.ended = cut
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
command()
"""


def test_a_search_that_is_cut_goes_on_by_the_same_command(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    folder = tmp_path / "a search"
    arguments = [
        f"dir={folder}", "trials=1",
        f"space={tmp_path / 'space.yaml'}", *small, "trainer.max_steps=400",
        "trainer.valid_every=100", "trainer.checkpoint_minutes=0.002", "trainer.threads=1",
    ]  # fmt: skip

    def cut(how: int, name: str, lines: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", CUT, str(int(how)), name, str(lines), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, done.stdout

    code, said = cut(signal.SIGINT, "config.yaml", 0)
    assert code == 130 and said.endswith("interrupted; the same command goes on\n"), said
    values = (folder / "0/overrides.json").read_text()
    code, said = cut(signal.SIGKILL, "metrics.jsonl", 60)
    assert code == -signal.SIGKILL, said
    assert [t.state.name for t in study_in(folder).trials] == ["RUNNING"]
    with open(folder / STUDY, "a") as file:
        file.write('{"op_code": 5, "tri')
    (folder / f"{STUDY}.lock").symlink_to(STUDY)
    search = [sys.executable, str(ROOT / "scripts/search.py"), *arguments]
    done = subprocess.run(search, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, waits, last = done.stdout.splitlines()
    assert first == f"{folder}: 0 completed, 0 pruned, 0 failed, 1 left"
    assert waits.endswith("0: going on, once no other process works there")
    assert re.fullmatch(
        r"trial 0 completed: ([\d.]+); best \1 \(trial 0\), 1 completed, 0 pruned, .* 0 left", last
    )
    assert (folder / "0/overrides.json").read_text() == values
    log = (folder / "0/train.log").read_text()
    assert "run interrupted" in log and "going on after step" in log
    (trial,) = study_in(folder).trials
    summary = json.loads((folder / "0/summary.json").read_text())
    assert summary["rounds"] == trial.params["model.rounds"] and summary["steps"] == 400
    assert trial.value == pytest.approx(math.log(summary["valid"]["static"]["ppl"]))
    assert list(trial.intermediate_values) == [1, 2, 3, 4]
    assert "# Search" in (folder / "report/sweep.md").read_text()


def running(study: optuna.Study, folder: Path, overrides: list[str]) -> TrialRun:
    return TrialRun(study.ask(), RunFolder(folder), overrides)


def test_a_hopeless_run_is_ended_and_one_that_fails_is_told(
    small: list[str], tmp_path: Path
) -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(1, n_warmup_steps=2))
    study.add_trial(optuna.create_trial(value=1.0, intermediate_values={1: 9.0, 2: 1.0, 3: 1.0}))
    endless = [*small, "trainer.max_steps=1000000"]
    runs = [
        running(study, tmp_path / "1", [*endless, "model.rounds=0"]),
        running(study, tmp_path / "2", [*small, "model.rank=99"]),
    ]
    deadline, left = time.monotonic() + 60, list(runs)
    while left and time.monotonic() < deadline:
        left = [run for run in left if not run.ended()]
        time.sleep(0.05)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert all(run.process.poll() is not None for run in runs)
    pruned = study.trials[1]
    assert list(pruned.intermediate_values) == [1, 2], "not at the first validation"
    summary = runs[0].folder.read_summary()
    assert summary["status"] == "pruned" and summary["seed"] == 1
    assert math.log(summary["best_ppl"]) <= min(pruned.intermediate_values.values())
    assert re.match(r"trial 1 pruned: validation perplexity [\d.]+ after", runs[0].outcome())
    assert "trial 2 failed: model.rank is 99" in runs[1].outcome()


def test_a_process_that_is_killed_is_a_failure(small: list[str], tmp_path: Path) -> None:
    run = running(optuna.create_study(), tmp_path / "0", small)
    run.process.kill()
    run.process.wait()
    assert run.ended() and "its process ended with code -9" in run.outcome()


def test_a_search_that_was_cut_proposes_what_it_would_have_proposed(
    make: Callable[..., Search],
) -> None:
    search = make(startup=2)

    def propose(study: optuna.Study) -> list[str]:
        trial, values = search._trial(study, None)
        study.tell(trial, float(len(values[0])) + trial.number % 3)
        return values

    whole = optuna.create_study()
    expected = [propose(whole) for _ in range(6)]
    search.dir.mkdir()
    parts = [propose(search._study()) for _ in range(6)]  # a new study object each time
    assert parts == expected and len(set(map(str, parts))) == 6
    for lr, rounds, rank in parts:
        assert re.fullmatch(r"optimizer\.lr=0\.0\d{1,6}", lr)
        assert re.fullmatch(r"model\.rounds=[0-3]", rounds)
        assert re.fullmatch(r"model\.rank=([1-8]|null)", rank)


def test_one_search_at_a_time_and_only_as_it_was_begun(make: Callable[..., Search]) -> None:
    search = make("model.hidden_size=8")
    with locked(search.dir):
        with pytest.raises(UserError, match="another process is at work in"):
            search.run()
        search._study()
        search._study()
        with pytest.raises(
            UserError, match="with model.hidden_size=8, without model.hidden_size=9"
        ):
            make("model.hidden_size=9")._study()
        with pytest.raises(UserError, match="is a search with model.rounds Range"):
            make("model.hidden_size=8", space="model.rank: {low: 1, high: 8, or_null: true}\n"
                 "optimizer.lr: {low: 1e-3, high: 1e-2, log: true}")._study()  # fmt: skip
    (search.dir / STUDY).unlink()
    make_run(search.dir / "0", {"seed": "1"}, 50.0)
    with pytest.raises(UserError, match="holds runs that are not of a search"):
        search._study()


BAD_SPACES = {
    "model.rounds: 3": "model.rounds: 3 is not a range",
    "model.rounds: {low: 3}": "model.rounds: it needs either low and high, or choices",
    "model.rounds: {low: 3, high: 1}": "model.rounds: low must not exceed high",
    "model.rounds: {low: 0, high: 1, log: true}": "must be above 0 with log",
    "model.rounds: {low: a, high: 1}": "model.rounds: ",
    "model.rounds: {low: 0, hihg: 1}": "unexpected keyword argument 'hihg'",
    "model.rounds: [": "is damaged",
    "[]": "does not hold keys and values",
    "{}": "holds no ranges",
    f"seed: {{choices: [0x{'f' * 5000}]}}": "is damaged",
    "model.roundz: {low: 0, high: 1}": "unknown key model.roundz; did you mean model.rounds?",
    "model.rounds: {low: 0.5, high: 1}": "model.rounds: Value '0.5' of type 'float'",
    "model.rounds: {low: -1, high: 1}": "model.rounds is -1, it must be at least 0",
    "optimizer.name: {choices: [adam, adan]}": "optimizer.name is 'adan', it must be one of",
}


@pytest.mark.parametrize("text", BAD_SPACES)
def test_a_wrong_space_is_one_clear_line(text: str, make: Callable[..., Search]) -> None:
    with pytest.raises(EXPECTED) as caught:
        make(space=text)
    line = explain(caught.value)
    assert BAD_SPACES[text] in line and "\n" not in line


def test_other_errors(make: Callable[..., Search], monkeypatch: pytest.MonkeyPatch) -> None:
    for override, line in {
        "resume=x": "resume=x: the trials of a search are single runs",
        "hydra.run.dir=x": "hydra.run.dir=x: the trials",
        "evaluators=[]": "evaluators=[]: a search needs the perplexity of one",
        "trails=3": "unknown key trails",
        "seed=1,2": "seed",
    }.items():
        with pytest.raises(EXPECTED) as caught:
            make(override)
        assert line in explain(caught.value)
    with pytest.raises(UserError, match="no space=smal; did you mean small?"):
        read_space("smal")
    with pytest.raises(UserError, match="trials, jobs, startup, warmup must be at least 1"):
        make(jobs=0)
    for name in ("optuna.storages", "optuna.storages.journal"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r'pip install "mogrifier_lm\[search\]"'):
        make().run()


def test_what_is_given_is_not_searched_and_jobs_share_the_cores(
    make: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    search = make("model.rounds=2", jobs=10_000)
    assert list(search.ranges) == ["optimizer.lr", "model.rank"]
    assert search.whole == {"optimizer.lr": False, "model.rank": True}
    assert search.settings == ["model.rounds=2", "tracker.group=search", "trainer.threads=1"]
    assert make("tracker.group=x").settings == ["tracker.group=x"]


def documented() -> list[str]:
    files = [ROOT / "README.md", Path(search_command.__file__), *SPACES.glob("*.yaml")]
    found = {
        line
        for f in files
        for line in re.findall(r"python scripts/search\.py (.*=\S+)", f.read_text())
    }
    return sorted(line for line in found if "my.yaml" not in line)


@pytest.mark.parametrize("command", documented())
def test_every_documented_search_composes(command: str) -> None:
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(Search, "run", lambda self: None)
        cli._call(search_command.main, shlex.split(command))


def test_commands_are_documented() -> None:
    assert len(documented()) >= 3


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """26 completed trials in which the learning rate matters, a pruned and a failed one."""
    folder = tmp_path / "s"
    folder.mkdir()
    study = optuna.create_study(
        study_name=NAME, storage=storage(folder / STUDY), sampler=optuna.samplers.RandomSampler(0)
    )
    ranges = {
        "optimizer.lr": Range(low=1e-3, high=1e-2, log=True),
        "model.rank": Range(low=1, high=90, or_null=True),
        "regularization.input_dropout": Range(low=0, high=0.9),
        "optimizer.averaging": Range(choices=["ema", "none"]),
    }
    for i in range(28):
        trial = study.ask()
        values = {k: r.suggest(trial, k, k == "model.rank") for k, r in ranges.items()}
        ppl = 80 + 20 * abs(math.log(values["optimizer.lr"] / 4e-3)) + values[
            "regularization.input_dropout"
        ]  # fmt: skip
        overrides = {k: "null" if v is None else str(v) for k, v in values.items()}
        if i == 20:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            make_run(folder / str(i), overrides, status="pruned", best_ppl=190.0,
                     error="validation perplexity 190.00 after 2 epochs")  # fmt: skip
        elif i == 21:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            make_run(folder / str(i), overrides, status="failed", error="the loss is nan")
        else:
            study.tell(trial, math.log(ppl))
            make_run(folder / str(i), overrides, ppl)
    return folder


def test_the_report_of_a_search(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = searched / "page.html"
    report_command.main(searched, html=html)
    text = (searched / "report/sweep.md").read_text()
    assert text.rstrip() in capsys.readouterr().out
    assert "28 runs: 26 completed, 1 pruned, 1 failed." in text and "best on validation" in text
    table = table_rows(text)
    best = min(study_in(searched).trials, key=lambda t: t.value or math.inf)
    assert table[2][:2] == [str(best.number), f"{best.params['optimizer.lr']:.4g}"]
    ppls = [float(row[-2]) for row in table[2:28]]
    assert ppls == sorted(ppls)
    shares = importances(read_runs([searched]))
    assert next(iter(shares)) == "optimizer.lr" and sum(shares.values()) == pytest.approx(1)
    assert ["optimizer.lr", f"{shares['optimizer.lr']:.2f}"] in table and "model.rank=null" in text
    assert ["pruned", "validation perplexity 190.00 after 2 epochs"] in [row[-2:] for row in table]
    for name in ("sweep.png", "importance.png"):
        assert (searched / "report" / name).stat().st_size > 5000
    shown = html.read_text()
    assert "Trials, best first" in shown and "Importance" in shown
    assert shown.count("<figure>") == 2, "no run has curves"


def test_importances_wait_for_enough_trials(searched: Path) -> None:
    lines = (searched / STUDY).read_text().splitlines(keepends=True)
    told = [i for i, line in enumerate(lines) if '"state":1' in line]
    (searched / STUDY).write_text("".join(lines[: told[4] + 1]))
    runs = read_runs([searched])
    write_report(runs, searched / "report")
    text = (searched / "report/sweep.md").read_text()
    assert "Told from 20 completed trials on; there are 5." in text
    assert not (searched / "report/importance.png").exists()
    assert "Importance" not in page(runs, "title")
