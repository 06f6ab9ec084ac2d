"""Rebuild the report of a sweep or of a run, and merge several, from the files in their folders.

python scripts/report.py runs/2026-01-31/12-00-00                # a sweep: its report/
python scripts/report.py SWEEP SWEEP RUN out=FOLDER              # merged
python scripts/report.py RUN                                     # its table and curves.png
python scripts/report.py SWEEP html=page.html                    # one self-contained page
python scripts/report.py SWEEP formats=pdf,svg latex=table.tex   # plots for print, the table too
"""

from functools import partial
from pathlib import Path

from mogrifier_lm.errors import UserError
from mogrifier_lm.files import write_whole
from mogrifier_lm.launch.cli import script
from mogrifier_lm.reports.folders import read_runs
from mogrifier_lm.reports.page import page
from mogrifier_lm.reports.plots import FORMATS, plot_curves
from mogrifier_lm.reports.report import markdown, write_report
from mogrifier_lm.reports.sweep import group_table
from mogrifier_lm.reports.table import final_table, latex_table
from mogrifier_lm.runs.folder import REPORT, RunFolder, Status, check_inside
from mogrifier_lm.terminal import plain


def main(
    *folders: Path,
    out: Path | None = None,
    html: Path | None = None,
    latex: Path | None = None,
    formats: list[str] | None = None,
) -> None:
    if not folders:
        raise UserError("no folder given: python scripts/report.py DIR")
    formats = formats or []
    if wrong := [kind for kind in formats if kind not in FORMATS]:
        raise UserError(f"formats={wrong[0]} is none of {', '.join(FORMATS)}")
    runs = read_runs(folders)
    if len(runs) == 1 and RunFolder(folders[0]).is_run():
        (run,) = runs
        for kind in dict.fromkeys(["png", *formats]):
            if run.folder.metrics.is_file() and (curves := plot_curves(run.folder, kind)):
                print(curves)
        done = run.status == Status.COMPLETED
        text = final_table(run.summary, run.folder.path) if done else f"{run.folder}: {run.status}"
        print(plain(text))
    else:
        if len(folders) > 1 and out is None:
            raise UserError("several folders: give out=FOLDER for the merged report")
        if out is None:
            check_inside(folders[0])
            out = folders[0] / REPORT
        write_report(runs, out, formats)
        print(plain(f"{markdown(runs)}\n{out}"))
    if latex:
        write_whole(latex, latex_table(group_table(runs)))
        print(latex)
    if html:
        write_whole(html, page(runs, title=" ".join(map(str, folders))))
        print(html)


command = partial(script, main)
