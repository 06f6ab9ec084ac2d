"""The walk-through runs, and its notebook is the same."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT, NOTEBOOK = ROOT / "docs/walkthrough.py", ROOT / "docs/walkthrough.ipynb"
CELLS = """
import json, sys
names = {}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""


def test_the_notebook_is_made_from_the_script() -> None:
    notebook = runpy.run_path(str(ROOT / "scripts/notebook.py"))["notebook"]
    made = notebook(SCRIPT.read_text(encoding="utf-8"))
    assert NOTEBOOK.read_text(encoding="utf-8") == made, "python scripts/notebook.py makes it anew"
    cells = json.loads(made)["cells"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    source = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("# %%")]
    kept = [line.removesuffix("  # noqa: E402") for line in source if line.strip("# ")]
    assert [line for line in lines if line] == [
        line.removeprefix("#").removeprefix(" ") if line.startswith("#") else line for line in kept
    ]


@pytest.mark.slow
def test_its_cells_run_one_after_the_other(tmp_path: Path) -> None:
    """Train, look, score, compare, sweep: from the folder that a notebook is opened in."""
    done = subprocess.run(
        [sys.executable, "-c", CELLS, str(NOTEBOOK)],
        cwd=ROOT / "docs", capture_output=True, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (out,) = tmp_path.glob("walkthrough-*")
    assert (out / "scores.tsv").is_file() and (out / "page.html").is_file()
    assert (out / "sweep/report/sweep.csv").read_text().count("completed") == 4
    assert "A − B = " in done.stdout and "floor" in done.stdout
