"""The reproduction of a curve, small: what is finished is left, what will not fit is not begun."""

import json
from pathlib import Path

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands import reproduce

SMALL = [
    "model.num_params=20000", "model.rank=2", "trainer.batch_size=4", "trainer.bptt=10",
    "trainer.valid_every=30", "trainer.threads=1", "evaluators.dynamic.window=50",
    "evaluators.dynamic.tune_tokens=50", "evaluators.dynamic.statistics_tokens=200",
]  # fmt: skip


@pytest.fixture
def run(text_dir: Path, cache_dir: Path, tmp_path: Path):
    def command(**options) -> str:
        reproduce.main(
            Path("curve"),
            data=text_dir,
            device="cpu",
            work=tmp_path / "work",
            overrides=[*SMALL, f"data.cache_dir={cache_dir}"],
            **options,
        )
        return (tmp_path / "work/curve.md").read_text()

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


def test_what_is_not_published_is_refused() -> None:
    with pytest.raises(UserError, match="rounds=7"):
        reproduce.main(Path("curve"), rounds=[7])
    with pytest.raises(UserError, match="curve"):
        reproduce.main()
