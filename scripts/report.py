"""Rebuild the report of a sweep or of a run, and merge several, from the files in their folders.

python scripts/report.py runs/2026-01-31/12-00-00                # a sweep: its report/
python scripts/report.py SWEEP SWEEP RUN out=FOLDER              # merged
python scripts/report.py RUN                                     # its table and curves.png
python scripts/report.py SWEEP html=page.html                    # one self-contained page
"""

import argparse
import sys
from pathlib import Path

from mogrifier_lm.errors import UserError
from mogrifier_lm.reports.folders import is_run, read_runs
from mogrifier_lm.reports.page import page
from mogrifier_lm.reports.plots import plot_curves
from mogrifier_lm.reports.report import markdown, write_report
from mogrifier_lm.reports.table import final_table


def main(arguments: list[str]) -> None:
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("html=", "out=")))
    folders = [Path(a) for a in arguments if not a.startswith(("html=", "out="))]
    if not folders:
        raise UserError("no folder given: python scripts/report.py DIR")
    runs = read_runs(folders)
    if len(runs) == 1 and is_run(folders[0]):
        (run,) = runs
        if (run.dir / "metrics.jsonl").is_file() and (curves := plot_curves(run.dir)):
            print(curves)
        print(
            final_table(run.summary, run.dir)
            if run.status == "completed"
            else f"{run.dir}: {run.status}"
        )
    else:
        if len(folders) > 1 and "out" not in options:
            raise UserError("several folders: give out=FOLDER for the merged report")
        out = Path(options.get("out", folders[0] / "report"))
        write_report(runs, out)
        print(f"{markdown(runs)}\n{out}")
    if "html" in options:
        Path(options["html"]).write_text(page(runs, title=" ".join(map(str, folders))))
        print(options["html"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="+", metavar="DIR | html=FILE | out=FOLDER")
    try:
        main(parser.parse_args().arguments)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
