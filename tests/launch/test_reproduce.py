"""The reproduction of a curve, small: what is finished is left, what will not fit is not begun."""

import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from mogrifier_lm.config import validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands import reproduce
from mogrifier_lm.launch.job import compose

SMALL = [
    "model.num_params=20000",
    "model.rank=2",
    "trainer.batch_size=4",
    "trainer.bptt=10",
    "trainer.valid_every=30",
    "trainer.threads=1",
]
DYNAMIC = [
    "evaluators.dynamic.window=50", "evaluators.dynamic.tune_tokens=50",
    "evaluators.dynamic.statistics_tokens=200",
]  # fmt: skip


@pytest.fixture
def run(text_dir: Path, cache_dir: Path, tmp_path: Path):
    def command(table: str = "curve", **options) -> str:
        own = [*(DYNAMIC if table == "curve" else []), *SMALL, f"data.cache_dir={cache_dir}"]
        reproduce.main(
            Path(table),
            data=text_dir,
            device="cpu",
            work=tmp_path / "work",
            overrides=own,
            **options,
        )
        return (tmp_path / f"work/{table}.md").read_text()

    return command


@pytest.mark.slow
def test_runs_are_made_one_by_one_kept_and_left_alone_when_finished(
    run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out, work = tmp_path / "out", tmp_path / "work"
    table = run(rounds=[0], epochs=1, out=out)
    summary = json.loads((out / "rounds=0,seed=1/summary.json").read_text())
    assert summary["status"] == "completed" and summary["rounds"] == 0
    assert summary["epochs"] >= 1
    for split in ("valid", "test"):
        for evaluator in ("static", "dynamic"):
            assert f"{summary[split][evaluator]['ppl']:.2f}" in table
    assert "57.5" in table and (out / "curve.md").read_text() == table
    assert not (out / "rounds=0,seed=1/checkpoints").exists()

    # A second one, cut after its training: it goes on from its checkpoint.
    run(rounds=[0, 4], epochs=1, out=out)
    second = work / "rounds=4,seed=1"
    (second / "summary.json").unlink()
    (out / "rounds=4,seed=1/summary.json").unlink()
    before = (work / "rounds=0,seed=1/summary.json").stat().st_mtime_ns
    caplog.clear()
    table = run(rounds=[0, 4], epochs=1, out=out, minutes=60)
    assert "going on after step" in caplog.text and "minutes are needed" in caplog.text
    assert (work / "rounds=0,seed=1/summary.json").stat().st_mtime_ns == before
    assert "54.1" in table and len(table.splitlines()) == 4


def test_what_will_not_fit_is_not_started(run, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    table = run(rounds=[1], epochs=1000, minutes=0.1)
    assert "not started" in caplog.text and "tokens/s" in caplog.text
    caplog.clear()
    run(rounds=[1], epochs=1000, minutes=-1.0)
    assert "no time is left" in caplog.text and "tokens/s" not in caplog.text
    assert "56.4" in table and not (tmp_path / "work/rounds=1,seed=1/checkpoints").exists()


@pytest.mark.slow
def test_runs_side_by_side_equal_those_one_after_the_other(run, tmp_path: Path) -> None:
    alone = run("rounds", rounds=[0, 2], epochs=1)
    ppls = [json.loads(p.read_text())["test"] for p in sorted(tmp_path.glob("work/*/summary.json"))]
    shutil.rmtree(tmp_path / "work")
    assert run("rounds", rounds=[0, 2], epochs=1, processes=2) == alone
    assert ppls == [
        json.loads(p.read_text())["test"] for p in sorted(tmp_path.glob("work/*/summary.json"))
    ]
    facts = json.loads((tmp_path / "work/rounds=2,seed=1/provenance.json").read_text())
    assert facts["command"][:3] == ["train.py", "experiment=ptb_3m", "model.rounds=2"]


@pytest.mark.parametrize(
    "table, number", [("curve", 7), ("rounds", 7), ("rank", 6), ("ablations", 7), ("wikitext2", 2)]
)
def test_the_runs_of_a_table_are_configs_and_differ(table: str, number: int) -> None:
    runs = reproduce.table_runs(table)
    configs = [asdict(validate(compose([*own, "tracker=none"]))) for own in runs.values()]
    assert len(configs) == number and all(a != b for a, b in itertools.combinations(configs, 2))
    rounds = {c["model"]["rounds"] for c in configs}
    assert len(rounds) == (2 if table == "ablations" else number)
    assert len({c["model"]["num_params"] for c in configs}) == 1
    rates = {c["optimizer"]["lr"] for c in configs if c["model"]["rounds"]}
    assert len(rates) == 1


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="rounds=7"):
        reproduce.main(Path("curve"), rounds=[7])
    with pytest.raises(UserError, match="rounds=0: rank has rounds=1"):
        reproduce.main(Path("rank"), rounds=[0])
    with pytest.raises(UserError, match=r"curve, rounds.*not nothing"):
        reproduce.main()
