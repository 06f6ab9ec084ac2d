"""Build the W&B workspace and report of a project's runs, or of one sweep's.

python scripts/dashboard.py project=mogrifier_lm entity=NAME
python scripts/dashboard.py project=mogrifier_lm entity=NAME group=SWEEP report=false
python scripts/dashboard.py project=mogrifier_lm entity=NAME out=workspace.json

Panels: perplexity against rounds by hidden size, mean and spread over seeds; curves over tokens,
epochs and seconds; gradient norms; cost against perplexity; parallel coordinates; the machine. A
sweep's group is its folder's name, 2026-01-31_12-00-00 where that is a time. Saving
needs a W&B account (`wandb login`) and runs that have
been uploaded; out=FILE writes the workspace as JSON and needs neither. Each call makes a new
workspace and a new report, and prints their addresses.
"""

from functools import partial
from pathlib import Path

from mogrifier_lm.launch.cli import script
from mogrifier_lm.tracking.dashboard import build_report, build_workspace, save, to_json


def main(
    *, project: str, entity: str, group: str = "", out: Path | None = None, report: bool = True
) -> None:
    workspace = build_workspace(project, entity, group)
    if out:
        out.write_text(to_json(workspace) + "\n", encoding="utf-8")
        print(out)
        return
    print(save(workspace))
    if report:
        print(save(build_report(project, entity, group)))


command = partial(script, main)
