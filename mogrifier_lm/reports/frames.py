"""Runs as tables of pandas, to be worked on further."""

from pathlib import Path
from typing import TYPE_CHECKING

from mogrifier_lm.errors import UserError
from mogrifier_lm.reports.folders import read_runs
from mogrifier_lm.reports.sweep import run_table

if TYPE_CHECKING:
    import pandas


def read_sweep(*folders: str | Path) -> "pandas.DataFrame":
    """The runs of sweeps, searches or single folders, a row each, with the columns of sweep.csv.

    Args:
        folders: each that of a sweep, a search or a run.

    Returns:
        Numbers as numbers, what is not known as a missing value.

    Raises:
        UserError: a folder that is neither; pandas is not installed.

    Example:
        >>> runs = read_sweep("runs/2026-01-31/12-00-00")
        >>> runs.groupby("model.rounds")["test/static/ppl"].agg(["mean", "std", "count"])
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("pandas is not installed: pip install pandas") from error
    frame = pandas.DataFrame(run_table(read_runs([Path(folder) for folder in folders])))
    frame = frame.replace("", None)
    for column in frame:
        numbers = pandas.to_numeric(frame[column], errors="coerce")
        if numbers.notna().equals(frame[column].notna()) and numbers.notna().any():
            frame[column] = numbers
    return frame
