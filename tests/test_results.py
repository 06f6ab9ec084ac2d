"""The page of results and the files that it comes from say the same."""

import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, table_rows

results = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/results.py")))
PAGE = (ROOT / "results/README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_files() -> None:
    for page in (PAGE, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert results.page(page) == page, "python scripts/results.py writes it anew"
    assert len(re.findall(r"<!-- table ", PAGE)) == PAGE.count("<!-- end -->") >= 8


def test_every_folder_of_a_run_is_on_the_page() -> None:
    folders = {path.parent.name for path in (ROOT / "results").glob("*/summary.json")}
    asked = {
        name for line in re.findall(r"<!-- table runs (.+?) -->", PAGE) for name in line.split()
    }
    assert asked == folders
    folders = {path.parent.name for path in (ROOT / "results").glob("*/*,seed=*/")}
    assert set(re.findall(r"<!-- table seeds (\S+) -->", PAGE)) == folders


def test_a_figure_that_changes_changes_the_table(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "results", tmp_path / "results")
    path = folder / "ptb_small/summary.json"
    summary = json.loads(path.read_text())
    summary["test"]["static"] |= {"ppl": 77.123, "temperature": 0.8}
    path.write_text(json.dumps(summary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(results.run_rows.__globals__, "FOLDER", folder)
        rows = table_rows(results.table("runs ptb_small"))
        assert rows[2][-2] == "77.12" and rows[2][rows[0].index("temperature")] == "1.25"
        (static,) = [
            r for r in table_rows(results.table("evaluators ptb_small")) if r[0] == "static"
        ]
        assert static[2] == "77.12" and static[3] == "+0.0%"
        sweep = folder / "ptb_rounds/sweep.csv"
        sweep.write_text(re.sub(r",120\.422\d+,", ",130.46425603614209,", sweep.read_text()))
        assert table_rows(results.table("sweep ptb_rounds model.rounds"))[2][-1] == "125.46 ± 7.07"
