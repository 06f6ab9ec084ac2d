"""A folder and a text from a stranger: nothing is written outside, nothing reaches the terminal."""

import csv
import json
import os
import tracemalloc
from pathlib import Path

import hydra
import pytest

from mogrifier_lm.config import CONFIG_DIR
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.explain import explain
from mogrifier_lm.launch.job import check_run
from mogrifier_lm.launch.sweep_report import grid, update_report
from mogrifier_lm.reports.folders import read_runs
from mogrifier_lm.reports.report import write_report
from mogrifier_lm.reports.table import markdown_text
from mogrifier_lm.runs.folder import RunFolder, check_inside
from mogrifier_lm.terminal import plain
from tests.conftest import main


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.tmp", "checkpoints/last/x", "wandb"])
def test_a_link_out_of_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / name).parent.mkdir(parents=True)
    outside.mkdir()
    (run / "latest").symlink_to(".")
    check_inside(run)
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{Path(name).name} is a link out of the folder"):
        check_inside(run)


def test_a_pipe_is_refused_before_one_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "overrides.json")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        check_inside(tmp_path)


@pytest.mark.parametrize("begin", ["train.py resume={0}", "scripts/evaluate.py run={0} {1}",
                                   "train.py -m seed=1 hydra.sweep.dir={0}"])  # fmt: skip
@pytest.mark.parametrize("name", ["train.log", "summary.json", "multirun.yaml", "report"])
def test_no_command_writes_through_a_link(
    begin: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    (run / "config.yaml").write_text("trainer: {max_steps: 1}\n")
    outside.write_text("{}")
    (run / name).symlink_to(outside)
    script, *arguments = begin.format("run", "evaluators=[static]").split()
    with pytest.raises(SystemExit):
        main(script, arguments)
    assert "is a link out of the folder" in capsys.readouterr().err
    assert outside.read_text() == "{}" and sorted(os.listdir(run)) == sorted(["config.yaml", name])


def test_a_terminal_is_told_nothing() -> None:
    text = "a\x1b]0;title\x07b\x9b2Jc\u202ed\r\udce9"
    assert plain(text) == "a\\x1b]0;title\\x07b\\x9b2Jc\\u202ed\\r\\udce9"
    for harmless in ("naïve\n\tword", "می\u200cخواهم", "a\xa0b", "日本"):
        assert plain(harmless) == harmless
    assert explain(UserError("no \x1b[31mfile")) == "no \\x1b[31mfile"
    assert explain(KeyError()) == "KeyError"


def test_a_report_holds_no_formula_and_no_html(tmp_path: Path) -> None:
    values = ["=1+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3", "\t=x", "-1.5", "<img src=x>", "\x1b[2J"]
    for i, value in enumerate(values):
        run = tmp_path / str(i)
        run.mkdir()
        (run / "overrides.json").write_text(json.dumps({"=key": value, "seed": "1"}))
        summary = {"status": "failed", "error": "<script>x</script> ![p](http://h/) | b\\<i>"}
        (run / "summary.json").write_text(json.dumps(summary))
    write_report(read_runs([tmp_path]), tmp_path / "report")
    with open(tmp_path / "report/sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["'=key"] for row in rows] == [
        *(f"'{value}" for value in values[:4]), "-1.5", "<img src=x>", "\\x1b[2J"
    ]  # fmt: skip
    page = (tmp_path / "report/sweep.md").read_text()
    assert "\x1b" not in page and "](http" not in page
    assert page.count("<") == page.count("\\<") > 0
    assert markdown_text("a\\<b") == "a\\\\\\<b", "the mark that takes a meaning away keeps its own"


def test_a_report_is_not_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outside, run = tmp_path / "outside", tmp_path / "sweep/0"
    outside.mkdir()
    run.mkdir(parents=True)
    (run / "overrides.json").write_text('{"seed": "1"}')
    (tmp_path / "sweep/report").symlink_to(outside)
    with pytest.raises(SystemExit):
        main("scripts/report.py", ["sweep"])
    assert "sweep/report is a link out of the folder" in capsys.readouterr().err
    update_report(Path("sweep"))
    assert "not written: sweep/report is a link" in caplog.text and "Traceback" not in caplog.text
    assert not [*outside.iterdir()]


def test_a_strangers_sweep_is_not_counted_without_end(tmp_path: Path) -> None:
    path = tmp_path / "multirun.yaml"
    for params, task in (
        ("{seed: 'range(0,1000000000)'}", "[]"),
        ("{seed: 'range(0,1,1e-9)'}", "[]"),
        ("{}", "['seed=range(0,5000)', 'model.rounds=range(0,5000)']"),
        ("{}", f"['seed={'[' * 900}']"),
        ("[1]", "5"),
    ):
        text = f"hydra: {{sweeper: {{params: {params}}}, overrides: {{task: {task}}}}}\n"
        path.write_text(text)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            assert grid(tmp_path) == []
    path.write_text(
        "hydra: {sweeper: {params: {seed: 'range(3,1,-1)'}}, overrides: {task: [a=b]}}\n"
    )
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        found = grid(tmp_path)
    assert found == [{"seed": "3", "a": "b"}, {"seed": "2", "a": "b"}]


@pytest.mark.parametrize("sweep", ["seed=range(0,9876543210)", "trainer.clip=range(0.1,0.2,1e-8)"])
def test_a_sweep_that_nobody_waits_for_is_refused(sweep: str) -> None:
    with pytest.raises(UserError, match="a sweep of more than 100,000 runs: give fewer values"):
        check_run(["-m", "tracker=none", sweep])


def test_a_log_of_one_line_without_end_is_read_in_parts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b'{"tokens": 1}\n')
    os.truncate(folder.metrics, 2**28)
    tracemalloc.start()
    assert list(folder.rows()) == [{"tokens": 1}]
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


@pytest.mark.parametrize(
    "line",
    [b'{"step": 3, "tokens": [9], "train/ppl": 2}', b'{"step": 3, "train/ppl": 2}', b"[1, 2]",
     b'{"step": 3, "tokens": 9, "train/ppl": "2"}', b"\xff\xfe{}", b"[" * 100_000, b'"train/ppl"',
     b'{"step": 3, "tokens": 9, "train/ppl": null}', b'{"step": 3, "tok'],
)  # fmt: skip
def test_a_line_that_is_no_row_is_left_out(line: bytes, tmp_path: Path) -> None:
    rows = [{"step": n, "tokens": 10 * n, "train/ppl": 5.5} for n in (1, 2)]
    first, second = (json.dumps(row).encode() for row in rows)
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b"\n".join([first, line, second, b""]))
    assert list(folder.rows()) == list(folder.rows("train/ppl")) == rows


HYDRA: dict[str, str] = {
    "trainer=null": "trainer takes names: default",
    "evaluators=[dynamic,3.5]": "evaluators takes names: cache",
    "experiment=1": "experiment takes names",
    "model=mogrifier,4": "model takes names: lstm",
    "regularization.l2=null": "regularization.l2 must have a value",
    "evaluators.rounds=7": "not a subclass of Rounds",
    "data.expected.types=4": "data.expected.types is a key of what is not there",
    "evaluators=[cache] evaluators.cache.tune_tokens=9 evaluators.rounds.x=1": "r: evaluators.r",
    "optimizer.beta2={a:1}": "optimizer.beta2: Value",
    "hydra=5": "must be a string or a list",
}


@pytest.mark.parametrize("override", HYDRA)
def test_the_wrong_kind_of_value_is_one_line(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main("train.py", ["tracker=none", *override.split()])
    error = capsys.readouterr().err
    assert HYDRA[override] in error and "Traceback" not in error
    assert error.startswith("error: ") and error.count("\n") == 1
