"""The report's arithmetic and its page, on run folders made by hand."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands import report as report_command
from mogrifier_lm.reports.folders import groups, mean_sd, progress, read_runs, swept
from mogrifier_lm.reports.page import page
from mogrifier_lm.reports.plots import plot_curves
from mogrifier_lm.reports.report import write_report
from mogrifier_lm.reports.sweep import failure_table, group_table
from mogrifier_lm.reports.sweep_plots import not_comparable, plot_sweep
from mogrifier_lm.reports.table import latex_table, score_table, shown_ppl
from mogrifier_lm.runs.folder import SCORE, RunFolder
from tests.conftest import ROOT, table_rows


def score(ppl: float) -> dict[str, float]:
    return dict.fromkeys(SCORE, 1.0) | {"ppl": ppl}


def make_run(
    folder: Path,
    overrides: dict[str, str],
    valid: float | None = None,
    *,
    data: str = "ptb",
    params: int = 24_000_000,
    **summary: Any,
) -> Path:
    """A folder as a run leaves it: completed with `valid`, else as `summary` says, else cut."""
    folder.mkdir(parents=True)
    (folder / "overrides.json").write_text(json.dumps(overrides))
    facts = {"data": {"name": data, "sha256": {"train": "1", "valid": "2", "test": "3"}}}
    facts |= {"git": None, "versions": {}, "command": []}
    (folder / "provenance.json").write_text(json.dumps(facts))
    if valid is not None:
        summary = {
            "status": "completed",
            "seed": int(overrides.get("seed", 1)),
            "params": params,
            "hidden_size": 64,
            "rounds": int(overrides.get("model.rounds", 0)),
            "tokens_per_second": 1000.0,
            "epochs": 145.0,
            "tokens": 9000,
            "seconds": 9.0,
            "valid": {"static": score(valid), "floor_ppl": 7.5},
            "test": {"static": score(valid - 1)},
        } | summary
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Rounds 2 and 10, seeds 1 and 2; of rounds 4 one run failed and one was cut."""
    for i, (rounds, seed, ppl) in enumerate([(2, 1, 60.0), (2, 2, 63.0), (10, 1, 55.0)]):
        make_run(tmp_path / f"s/{i}", {"model.rounds": str(rounds), "seed": str(seed)}, ppl)
    reason = "out | of\nmemory"
    make_run(tmp_path / "s/3", {"model.rounds": "4", "seed": "1"}, status="failed", error=reason)
    make_run(tmp_path / "s/10", {"model.rounds": "4", "seed": "2"})
    (tmp_path / "s/report").mkdir()
    return tmp_path / "s"


def test_mean_and_standard_deviation() -> None:
    assert mean_sd([60.0, 63.0, 66.0]) == (63.0, 3.0)  # of a sample: divided by n - 1
    assert mean_sd([60.0, math.nan])[0] == 60 and math.isnan(mean_sd([60.0, math.nan])[1])
    assert all(map(math.isnan, mean_sd([])))


def test_table_has_a_row_per_group_and_failures_are_told_apart(sweep: Path) -> None:
    runs = read_runs([sweep])
    assert [run.folder.path.name for run in runs] == ["0", "1", "2", "3", "10"]
    assert swept(runs) == ["model.rounds"]
    two, ten = group_table(runs)  # 10 comes after 2
    assert two == {
        "model.rounds": "2", "hidden size": "64", "parameters": "24,000,000", "n": "2",
        "tokens/s": "1,000 ± 0", "valid, static": "61.50 ± 2.12", "test, static": "60.50 ± 2.12",
    }  # fmt: skip
    assert ten["model.rounds"] == "10" and ten["n"] == "1" and ten["valid, static"] == "55.00"
    failed, cut = failure_table(runs)
    assert failed["run"] == "3" and failed["status"] == "failed"
    assert cut["run"] == "10" and cut["status"] == "unfinished" and cut["error"] == ""


def test_files_of_the_report(sweep: Path) -> None:
    write_report(read_runs([sweep]), sweep / "report")
    assert {p.name for p in (sweep / "report").iterdir()} == {"sweep.csv", "sweep.md", "sweep.png"}
    with open(sweep / "report/sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["1", "2", "1", "1", "2"]
    assert rows[1]["valid/static/ppl"] == "63.0" and rows[1]["test/static/ppl"] == "62.0"
    assert rows[3]["error"] == "out | of\nmemory" and rows[3]["valid/static/ppl"] == ""
    text = (sweep / "report/sweep.md").read_text()
    assert "5 runs: 3 completed, 1 failed, 1 unfinished." in text and "itself is 7.50" in text
    assert ["3", "4", "1", "failed", "out \\| of memory"] in table_rows(text)


def test_a_sweep_without_a_completed_run_has_a_report(tmp_path: Path) -> None:
    make_run(tmp_path / "s/0", {"seed": "1"}, status="failed", error="no")
    write_report(read_runs([tmp_path / "s"]), tmp_path / "s/report")
    text = (tmp_path / "s/report/sweep.md").read_text()
    assert "No run has completed" in text and "sweep.png" not in text
    assert not (tmp_path / "s/report/sweep.png").exists()
    assert "failed" in page(read_runs([tmp_path / "s"]), "title")


def test_folders_that_are_no_runs_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither of a run nor of a sweep"):
        read_runs([tmp_path])
    run_dir = make_run(tmp_path / "s/0", {"seed": "1"}, 50.0)
    (run_dir / "summary.json").write_text('{"status": ')
    (run_dir / "provenance.json").unlink()
    (run,) = read_runs([tmp_path / "s"])
    assert run.status == "failed" and "summary.json is damaged" in run.summary["error"]


def test_sweeps_merge(sweep: Path, tmp_path: Path) -> None:
    """A run without an override takes its value from what the summary says it was."""
    make_run(tmp_path / "lstm", {"model": "lstm", "seed": "3"}, 65.0)
    runs = read_runs([sweep, tmp_path / "lstm", sweep])
    assert len(runs) == 6, "a folder given twice counts once"
    assert swept(runs) == ["model.rounds", "model"]
    assert [(key, len(group)) for key, group in groups(runs).items()] == [
        (("0", "lstm"), 1), (("2", ""), 2), (("10", ""), 1)]  # fmt: skip
    names = [row["run"] for row in failure_table(runs)]
    assert names == ["s/3", "s/10"]


@pytest.mark.parametrize(
    ("data", "params", "epochs", "reason"),
    [
        ("ptb", 23_900_000, 145, ""),
        ("ptb", 2_970_000, 145, "3.0 M parameters"),
        ("wikitext2", 24_000_000, 145, "data wikitext2"),
        ("ptb", 24_000_000, 3, "3 epochs in the place of 145"),
    ],
)
def test_the_papers_curve_says_where_it_is_not_comparable(
    tmp_path: Path, data: str, params: int, epochs: int, reason: str
) -> None:
    for rounds in (0, 1):
        overrides = {"model.rounds": str(rounds)}
        make_run(tmp_path / f"{rounds}", overrides, 60.0, data=data, params=params, epochs=epochs)
    runs = read_runs([tmp_path])
    assert not_comparable(runs) == reason
    text = page(runs, "title")
    assert "Melis et al. 2020" in text and ("not comparable" in text) == bool(reason)


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("model.rounds", ("0", "1"), ["rounds", "hidden_size 32", "hidden_size 64", "Melis"]),
        ("optimizer.lr", ("0.001", "0.1"), ["optimizer.lr", "hidden_size 32"]),
        ("model.rank", ("null", "8"), ["model.hidden_size", "rank null"]),
        ("ablation", ("lstm", "mlstm"), ["model.hidden_size", "ablation mlstm"]),
    ],
)
def test_what_the_plot_shows(
    tmp_path: Path, key: str, values: tuple[str, str], shown: list[str]
) -> None:
    for value in values:
        for hidden in ("32", "64"):
            overrides = {key: value, "model.hidden_size": hidden}
            make_run(tmp_path / f"{value}-{hidden}", overrides, 60.0)
    text = page(read_runs([tmp_path]), "title")
    for words in shown:
        assert f">{words}" in text
    assert ("Melis" in text) == (key == "model.rounds")


def test_categories_stand_beside_each_other(tmp_path: Path) -> None:
    for i, ablation in enumerate(("lstm", "mlstm")):
        make_run(tmp_path / f"{i}", {"ablation": ablation}, 60.0 + i)
    file = tmp_path / "plot.png"
    assert plot_sweep(read_runs([tmp_path]), file) and file.stat().st_size > 5000
    assert re.search(r">lstm</text>.*>mlstm</text>", page(read_runs([tmp_path]), ""), re.DOTALL)


def test_progress(sweep: Path) -> None:
    runs = read_runs([sweep])
    began = min(run.ended for run in runs if run.ended) - 60
    grid = [run.overrides for run in runs] + [{"model.rounds": "10", "seed": "2"}]
    line = progress(runs, grid, began)
    assert line.startswith("3 of 6 runs done, 1 failed, 2 left, about ")
    seconds = int(line.split()[-2])
    assert 38 <= seconds <= 60, "a minute for three runs, two are left"
    assert progress(runs, grid[:3], began) == "3 of 3 runs done, 0 failed, 0 left"


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script_merges_folders_and_refuses_in_one_line(sweep: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "lstm", {"model": "lstm"}, 65.0)
    done = report(
        str(sweep), str(run_dir), f"out={tmp_path / 'out'}", f"html={tmp_path / 'p.html'}"
    )
    assert done.returncode == 0, done.stderr
    assert "61.50 ± 2.12" in done.stdout and (tmp_path / "out/sweep.png").is_file()
    assert "61.50 ± 2.12" in (tmp_path / "p.html").read_text()
    alone = report(str(shutil.copytree(ROOT / "results/ptb_small", tmp_path / "run")))
    known = json.loads((ROOT / "results/ptb_small/summary.json").read_text())["valid"]["static"]
    assert alone.returncode == 0, alone.stderr
    assert re.search(rf"static perplexity +{known['ppl']:.2f}", alone.stdout)
    refused = report(str(tmp_path / "nowhere"))
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLICK = """<script>
document.querySelectorAll("th button").forEach(b => {
  if (b.textContent == "valid, static") b.click();
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_stands_alone_and_its_tables_sort(sweep: Path, tmp_path: Path) -> None:
    make_run(sweep / "20", {"model.rounds": "1", "seed": "1"}, 1061.0)
    (sweep / "0/metrics.jsonl").write_text('{"tokens": 9, "valid/ppl": 80.0}\n{"tokens": 18, "va')
    text = page(read_runs([sweep]), "<sweep>")
    assert len(text) < 200_000
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', text)
    file = tmp_path / "page.html"
    file.write_text(text + CLICK)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=60)
    table = done.stdout.split("<tbody>")[1].split("</tbody>")[0]
    ppls = re.findall(r"<td[^>]*>([^<]*)</td><td[^>]*>[^<]*</td></tr>", table)
    assert ppls == ["55.00", "61.50 ± 2.12", "1,061.00"]
    assert '<th aria-sort="ascending">' in done.stdout and "&lt;sweep&gt;" in done.stdout
    assert done.stdout.count("<svg") == 2


def test_plots_for_print_and_a_table_for_latex(sweep: Path, tmp_path: Path) -> None:
    latex = tmp_path / "t.tex"
    report_command.main(sweep, out=tmp_path, latex=latex, formats=["pdf", "svg"])
    assert (tmp_path / "sweep.pdf").read_bytes().startswith(b"%PDF")
    svg = (tmp_path / "sweep.svg").read_text()
    assert "parameters, millions" in svg and "training time, minutes" in svg and "(n = 1" in svg
    lines = latex.read_text().splitlines()
    assert lines[2].startswith("model.rounds & ") and r"61.50 $\pm$ 2.12" in latex.read_text()
    with pytest.raises(UserError, match="formats=gif is none of png, pdf, svg"):
        report_command.main(sweep, formats=["gif"])


def test_the_curves_of_a_run_have_a_title_and_the_floor(tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(ROOT / "results/ptb_small", tmp_path / "run"))
    summary = json.loads(folder.summary.read_text())
    summary["valid"]["floor_ppl"] = 71.25
    folder.summary.write_text(json.dumps(summary))
    path = plot_curves(folder, "svg")
    assert path is not None
    text = path.read_text()
    assert "run: ptb" in text and "floor, the source itself: 71.25" in text


def test_latex_takes_every_character() -> None:
    (row,) = latex_table([{"a_b": r"50 % \ {~} ^ & # $"}]).splitlines()[4:5]
    assert row == (r"50 \% \textbackslash{} \{\textasciitilde{}\} \textasciicircum{} \& \# \$ \\")


def test_a_sweep_is_a_frame_of_pandas(sweep: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    from mogrifier_lm import read_sweep

    runs = read_sweep(sweep)
    assert len(runs) == 5 and runs["model.rounds"].tolist() == [2, 2, 10, 4, 4]
    done = runs[runs.status == "completed"]
    means = done.groupby("model.rounds")["valid/static/ppl"].mean()
    assert means[2] == pytest.approx(61.5)
    assert runs["valid/static/ppl"].isna().sum() == 2 and runs["error"].isna().sum() == 4
    with pytest.raises(UserError, match="neither of a run nor of a sweep"):
        read_sweep(tmp_path)


def test_the_speed_of_runs_side_by_side_is_marked(tmp_path: Path) -> None:
    """Runs 0 and 1 overlap, 2 comes later; not on a cluster, where nobody knows."""
    for i, started in enumerate(("10:00:00", "10:00:50", "10:02:00")):
        folder = make_run(tmp_path / f"{i}", {"model.rounds": str(i)}, 60.0, seconds=60.0)
        path = folder / "provenance.json"
        facts = json.loads(path.read_text()) | {"started": f"2026-01-31T{started}+01:00"}
        path.write_text(json.dumps(facts))
    runs = read_runs([tmp_path])
    assert [run.beside for run in runs] == [1, 1, 0]
    assert [row["tokens/s"] for row in group_table(runs)] == ["1,000 †", "1,000 †", "1,000"]
    write_report(runs, tmp_path / "report")
    assert "Tokens/s †: other runs were at work" in (tmp_path / "report/sweep.md").read_text()
    table = (tmp_path / "report/sweep.csv").read_text().splitlines()
    assert [line.rpartition(",")[2] for line in table] == ["runs_beside", "1", "1", "0"]
    assert r"1,000 $\dagger$" in latex_table(group_table(runs))
    launcher = "hydra:\n  launcher:\n    _target_: hydra_plugins.submitit.SlurmLauncher\n"
    (tmp_path / "multirun.yaml").write_text(launcher)
    assert not any(run.beside for run in read_runs([tmp_path]))


def test_a_perplexity_that_no_number_holds_is_no_flood_of_digits() -> None:
    score = {"ppl": None, "token_ppl": 9.0, "bits_per_byte": 2.0, "tokens": 3, "words": 3}
    summary = {"valid": {"static": score}, "test": {"static": score | {"ppl": 3.25e128}}}
    assert score_table(summary).split()[-2:] == ["infinite", "3.25e+128"]
    assert math.isnan(shown_ppl(score))


@pytest.mark.parametrize(
    "value", [r"$\nosuch$", "$_^{", "a" * 50_000, "\ud800", "1e308", "-inf", "nan", "\x1b[2J"]
)
def test_a_text_or_number_of_anybodys_does_not_end_a_plot(value: str, tmp_path: Path) -> None:
    for i in range(2):
        overrides = {"optimizer.lr": value if i else "0.1", value: str(i)}
        run = make_run(tmp_path / "s" / str(i), overrides, 60.0 + i, data=value)
        row = {"step": 1, "tokens": 10, "valid/ppl": 60.0}
        (run / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
    runs = read_runs([tmp_path / "s"])
    write_report(runs, tmp_path / "report", ["svg"])
    page(runs, "title")
    assert plot_curves(RunFolder(run))
    assert len((tmp_path / "report/sweep.svg").read_text()) < 200_000


@pytest.mark.parametrize("number", [1e308, -1.0, 0.0, 1e-320, math.inf, math.nan])
def test_a_number_that_no_axis_takes_is_left_out(number: float, tmp_path: Path) -> None:
    for i in range(2):
        run = make_run(tmp_path / "s" / str(i), {"seed": str(i)}, 60.0)
        found = number if math.isfinite(number) else 1.0
        summary = json.loads((run / "summary.json").read_text())
        summary["valid"] = {"static": score(found), "floor_ppl": found}
        summary |= {"tokens_per_second": found, "seconds": found}
        (run / "summary.json").write_text(json.dumps(summary))
        row = dict.fromkeys(("tokens", "valid/ppl", "train/ppl", "train/lr"), number)
        with open(run / "metrics.jsonl", "w") as file:
            file.writelines(f"{json.dumps(r)}\n" for r in (row, {"tokens": 5, "valid/ppl": 3}))
    runs = read_runs([tmp_path / "s"])
    write_report(runs, tmp_path / "report")
    assert "</svg>" in page(runs, "title") and plot_curves(RunFolder(run))


def test_scores_of_one_split_alone_are_damage() -> None:
    whole = {"valid": {"static": score(3.0)}, "test": {"static": score(2.0)}}
    assert "3.00" in score_table(whole)
    for valid in (
        {"other": score(3.0)}, {"floor_ppl": 2.0}, {"static": 5},
        {"static": score(3.0) | {"x_ppl": "y"}},
        {"static": score(3.0) | {"bits_per_character": 1.0}},
    ):  # fmt: skip
        with pytest.raises(UserError, match="its scores are not what a run writes"):
            score_table(whole | {"valid": valid})
