"""scripts/evaluate.py through the command line."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT

EVALUATORS = "evaluators=[static,dynamic,cache,dynamic_cache,mc_dropout,rounds]"


def call(script: str, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


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
        "run=r2", EVALUATORS, "evaluators.dynamic.lr=[1e-4,1e-3]", "evaluators.cache.window=[50]",
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
            assert f"{after[split][name]['ppl']:.2f}" in done.stderr
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
    assert f"A − B = {difference:+.4f} nats/word [" in done.stderr
    assert "10,000 resamples" in done.stderr
    seeds = call("scripts/evaluate.py", ["compare=[[r0,r2],[r2,r0]]"], runs)
    assert "A − B = +0.0000 nats/word [+0.0000, +0.0000]" in seeds.stderr
    assert "(n = 2)" in seeds.stderr


@pytest.mark.slow
def test_no_evaluator_beats_the_source_of_the_synthetic_language(tmp_path: Path) -> None:
    """Under the source, any predictor of the next word from the past gains more than ln(1 / a)
    nats on it with probability at most a (Ville's inequality): 10 nats, once in 22,000 texts."""
    done = call("train.py", [
        "tracker=none", "evaluators=[static,dynamic,cache,dynamic_cache,mc_dropout]",
        "trainer.max_steps=600", f"hydra.run.dir={tmp_path}/run",
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
    "run=r2 model.rounds=1": "model.rounds=1: a run goes on as it was begun",
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
    assert last.startswith("error: ") and BAD[arguments] in last
