"""The report of a sweep, written anew as each of its runs ends.

Imports here are light: pandas and matplotlib come in when a report is written.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mogrifier_lm.config import load_config, read_yaml
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.explain import EXPECTED, explain
from mogrifier_lm.launch.overrides import as_values, check_grid
from mogrifier_lm.reports.folders import Run
from mogrifier_lm.runs.folder import MULTIRUN, REPORT, check_inside, locked
from mogrifier_lm.terminal import shown

log = logging.getLogger(__name__)


def grid(sweep_dir: Path) -> list[dict[str, str]]:
    """The overrides of every run that the command of a sweep asks for.

    [] where a search decides, or where the file is not as Hydra writes it.
    """
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    try:
        sweep = read_yaml(sweep_dir / MULTIRUN)["hydra"]
        params = [f"{key}={value}" for key, value in (sweep["sweeper"].get("params") or {}).items()]
        parsed = parser.parse_overrides([*params, *sweep["overrides"]["task"]])
        check_grid(parsed)
        return [as_values(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]
    except (HydraException, UserError, LookupError, AttributeError, TypeError, RecursionError):
        return []


def report_sweep(sweep_dir: Path) -> None:
    """Write the report of a sweep as far as it is, and say how far that is."""
    from mogrifier_lm.reports.folders import ended, progress

    def has_ended(runs: Sequence[Run]) -> bool:
        jobs, began = grid(sweep_dir), (sweep_dir / MULTIRUN).stat().st_mtime
        path = shown(sweep_dir) / REPORT / "sweep.md"
        log.info("%s: %s", path, progress(runs, jobs, began))
        return ended(runs, jobs, began)

    update_report(sweep_dir, has_ended)


def update_report(folder: Path, ended: Callable[[Sequence[Run]], bool] = lambda _: False) -> None:
    """Write the report of a sweep or a search as far as it is; a failure is a warning.

    Args:
        folder: of its runs.
        ended: whether it has, seen its runs: then W&B gets its summary.
    """
    try:
        from mogrifier_lm.reports.folders import read_runs
        from mogrifier_lm.reports.report import write_report

        check_inside(folder)
        with locked(folder / REPORT, wait=True):
            runs = read_runs([folder])
            begun = next((run.folder for run in runs if run.folder.has_begun()), None)
            formats = load_config(begun.config).report.formats if begun else []
            write_report(runs, folder / REPORT, formats)
            if ended(runs):
                from mogrifier_lm.tracking.sweep_summary import track_sweep

                track_sweep(runs, folder)
    except EXPECTED as error:  # the runs are worth more than their report
        log.warning("the report of %s is not written: %s", folder, explain(error))
    except Exception:
        log.warning("the report of %s is not written", folder, exc_info=True)
