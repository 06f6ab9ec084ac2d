"""scripts/evaluate.py through the command line."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mogrifier_lm import load_model
from mogrifier_lm.config import load_config
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.rounds import Rounds
from mogrifier_lm.evaluators.static import Static
from mogrifier_lm.reports.compare import compare_runs
from mogrifier_lm.runs.evaluate import evaluate_run
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training import checkpoint
from tests.conftest import ROOT

ALL = "evaluators=[static,dynamic,cache,dynamic_cache,mc_dropout,rounds]"


def call(script: str, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def runs(text_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs that differ in their rounds: r0 and r2."""
    folder = tmp_path_factory.mktemp("runs")
    for r in (0, 2):
        done = call("train.py", [
            "data=text", f"data.dir={text_dir}", f"data.cache_dir={cache_dir}", "tracker=none",
            "model.hidden_size=12", f"model.rounds={r}", "trainer.batch_size=4",
            "trainer.max_steps=12", "trainer.threads=1", f"hydra.run.dir={folder}/r{r}",
        ], folder)  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def test_a_run_is_scored_and_its_summary_takes_the_scores_in(runs: Path) -> None:
    before = json.loads((runs / "r2" / "summary.json").read_text())
    done = call("scripts/evaluate.py", [
        "run=r2", ALL, "evaluators.dynamic.lr=[1e-4,1e-3]", "evaluators.cache.window=[50]",
        "evaluators.mc_dropout.passes=3",
    ], runs)  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = json.loads((runs / "r2" / "summary.json").read_text())
    names = ["static", "dynamic", "cache", "dynamic_cache", "mc_dropout", "rounds"]
    for split in ("valid", "test"):
        assert list(after[split]) == names
        for entry in after[split].values():
            assert {"ppl", "nats", "tokens", "words", "bytes"} <= set(entry)
            assert entry["tokens"] == before[split]["static"]["tokens"]
        static = before[split]["static"]["nats"]
        for name in ("static", "rounds"):
            assert after[split][name]["nats"] == pytest.approx(static, rel=1e-6)
        assert after[split]["rounds"]["rounds_2_ppl"] == after[split]["rounds"]["ppl"]
        assert after[split]["cache"]["window"] == 50 and after[split]["mc_dropout"]["passes"] == 3
        for name in names:
            assert f"{after[split][name]['ppl']:.2f}" in done.stdout
    assert after["seconds"] == before["seconds"]
    tuning = json.loads((runs / "r2" / "tuning.json").read_text())
    assert [t["lr"] for t in tuning["dynamic"]] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert {t["lr"] for t in tuning["dynamic"]} >= {after["test"]["dynamic"]["lr"]}


def test_a_comparison_is_paired_and_has_an_interval(runs: Path) -> None:
    done = call("scripts/evaluate.py", ["compare=[r0,r2]"], runs)
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((runs / r / "summary.json").read_text()) for r in ("r0", "r2"))
    static = [s["test"]["static"] for s in (a, b)]
    difference = (static[0]["nats"] - static[1]["nats"]) / static[0]["words"]
    assert f"A − B = {difference:+.4f} nats/word [" in done.stdout
    assert "10,000 resamples" in done.stdout
    seeds = call("scripts/evaluate.py", ["compare=[[r0,r2],[r2,r0]]", "out=both.json"], runs)
    assert "A − B = +0.0000 nats/word [-" in seeds.stdout and "and of the runs" in seeds.stdout
    assert "(n = 2)" in seeds.stdout
    found = json.loads((runs / "both.json").read_text())
    assert found["A"] == ["r0", "r2"] and found["B"] == ["r2", "r0"]
    test = found["static"]["test"]
    assert test["ppl"] == [[s["ppl"] for s in static], [s["ppl"] for s in static[::-1]]]
    low, high = test["interval"]
    # Five draws of the runs in sixteen differ by half of it or more, as many by as much less.
    assert low <= -abs(difference) / 2 < abs(difference) / 2 <= high


def test_models_that_know_other_words_are_not_compared_silently(
    runs: Path, text_dir: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "text"
    shutil.copytree(text_dir, folder)
    word = (folder / "test.txt").read_text().split()[0]
    (folder / "train.txt").write_text((folder / "train.txt").read_text().replace(word, "<unk>"))
    done = call("train.py", [
        "data=text", f"data.dir={folder}", f"data.cache_dir={cache_dir}", "tracker=none",
        "model.hidden_size=12", "trainer.batch_size=4", "trainer.max_steps=2",
        "trainer.threads=1",
        f"hydra.run.dir={tmp_path}/fewer",
    ], tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    sides = [
        [(load_config(RunFolder(path).config), RunFolder(path))]
        for path in (runs / "r2", tmp_path / "fewer")
    ]
    with caplog.at_level(logging.INFO):
        compare_runs(sides)
    share = r"test: \d+\.\d\d % of the words are <unk> to A, \d+\.\d\d % to B"
    assert re.search(share, caplog.text)
    (folder / "test.txt").write_text("another text\n")
    other = load_config(tmp_path / "fewer/config.yaml")
    with pytest.raises(UserError, match="the test text is not the one of the run"):
        compare_runs([sides[0], [(other, RunFolder(tmp_path / "fewer"))]])
    for wrong in ([], [*sides[0], *sides[0]]):
        with pytest.raises(UserError, match="a side has no run, or one run twice"):
            compare_runs([sides[0], wrong])


DAMAGES: dict[str, tuple[str, bytes | None, str]] = {  # file, what it holds then, the error
    "provenance": ("provenance.json", b"{", "provenance.json is damaged"),
    "no provenance": ("provenance.json", None, "no provenance.json in"),
    "summary": ("summary.json", b'{"status": ', "summary.json is damaged"),
    "tokenizer": ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
    "truncated": ("checkpoints/best/model.safetensors", b"\x00" * 100, "is damaged"),
    "config": ("config.yaml", b"\xff\xfe", "config.yaml is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_one_clear_line(damage: str, runs: Path, tmp_path: Path) -> None:
    name, content, expected = DAMAGES[damage]
    shutil.copytree(runs / "r2", tmp_path / "run")
    if content is None:
        (tmp_path / "run" / name).unlink()
    else:
        (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        evaluate_run(load_config(tmp_path / "run/config.yaml"), RunFolder(tmp_path / "run"))


def test_weights_that_cannot_be_used_are_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "r2", tmp_path / "run")
    path = RunFolder(tmp_path / "run").best
    tensors, values = checkpoint.load(path)
    tensors["output_bias"][3] = math.nan
    checkpoint.save(path, tensors, values)
    with pytest.raises(UserError, match="output_bias holds NaN or infinite weights"):
        load_model(tmp_path / "run")
    del tensors["output_bias"]
    checkpoint.save(path, tensors, values)
    with pytest.raises(UserError, match="does not fit the config and the tokenizer: it has"):
        load_model(tmp_path / "run")


def test_what_is_scored_is_kept_when_a_later_evaluator_fails(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "r2", tmp_path / "run")
    config = load_config(tmp_path / "run/config.yaml")
    config.evaluators.static = Static(window=7)
    config.evaluators.rounds = Rounds()
    monkeypatch.setattr(Rounds, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_run(config, RunFolder(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"]["static"]["window"] == 7


@pytest.mark.slow
def test_no_evaluator_beats_the_source_of_the_synthetic_language(tmp_path: Path) -> None:
    """Under the source, any predictor of the next word from the past gains more than ln(1 / a)
    nats on it with probability at most a (Ville's inequality): 10 nats, once in 22,000 texts."""
    done = call("train.py", [
        "tracker=none", "evaluators=[static,dynamic,cache,dynamic_cache,mc_dropout]",
        "evaluators.dynamic.lr=[2e-4,8e-4]", "evaluators.dynamic.decay=[1e-2]",
        "evaluators.mc_dropout.passes=8", "trainer.max_steps=600", "trainer.threads=1",
        f"hydra.run.dir={tmp_path}/run",
    ], tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for split in ("valid", "test"):
        floor_ppl = summary[split].pop("floor_ppl")
        for name, entry in summary[split].items():
            assert entry["nats"] > math.log(floor_ppl) * entry["words"] - 10, (split, name)


BAD = {
    "": "give either run=RUN_DIR or compare=[RUN_A,RUN_B]",
    "run=nowhere": "no config.yaml in nowhere",
    "run=r2 model.rounds=1": "model.rounds=1 is not what r2 was begun with",
    "run=r2 evaluators=[]": "no evaluators: give evaluators=[static]",
    "run=r2 evaluators=[statc]": "no evaluators=statc; did you mean static?",
    "run=r2 evaluators=[dynamic_cache]": "dynamic_cache] needs dynamic beside it",
    "run=r2 evaluators=[dynamic] evaluators.dynamic.lr=1": "evaluators.dynamic.lr=[1]",
    "run=r2 evaluators=[dynamic] evaluators.dynamic.lr=[]": "evaluators.dynamic.lr is empty",
    "run=r2 evaluators=[cache] evaluators.cache.weight=[1.0]": "cache.weight is 1.0",
    "compare=[r2]": "takes two runs",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_clear_line(arguments: str, runs: Path) -> None:
    done = call("scripts/evaluate.py", [*arguments.split(), "debug=false"], runs)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and done.stdout == "" and BAD[arguments] in last
