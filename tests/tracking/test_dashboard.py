"""The dashboard plots keys that runs have, and the real library saves it on a stand-in server."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mogrifier_lm.config import Config, validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands.dashboard import main
from mogrifier_lm.launch.tracked import tracked_run
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking import dashboard
from mogrifier_lm.tracking.offline import read_offline
from tests.conftest import compose_config
from tests.wandb_stand_in import WandbStandIn

pytest.importorskip("wandb_workspaces")
pytestmark = [
    pytest.mark.usefixtures("own_wandb"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_panels_show_what_runs_log(small: list[str], tmp_path: Path) -> None:
    main(project="p", entity="me", group='it\'s a "sweep"', out=tmp_path / "w.json")
    text = (tmp_path / "w.json").read_text()
    found = panels(json.loads(text)["spec"])
    kinds = {panel["viewType"] for panel in found}
    assert kinds >= {"Run History Line Plot", "Scatter Plot", "Parallel Coordinates Plot"}
    first = found[0]["config"]
    assert first["xAxis"] == "rounds" and first["groupBy"] == "model.value.hidden_size"
    assert first["groupArea"] == "stddev"

    config = validate(compose_config([*small, "tracker=wandb", "tracker.mode=offline"]))
    tracked_run(config, RunFolder(tmp_path), [])
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    logged = read_offline(folder)
    rows = [set(row) for row in logged["history"]]
    lines = [p["config"] for p in found if p["viewType"] == "Run History Line Plot"]
    curves = [(c["xAxis"], y) for c in lines for y in c["metrics"] if "system" not in y]
    assert len(curves) >= 7
    for x, y in curves:
        assert any({x, y} <= row for row in rows), f"no row holds {x} and {y}"
    for key in set(re.findall(r'"summary:([^"]+)"', text)):
        assert key in logged["summary"], key
    plain = dataclasses.asdict(Config())
    keys = set(re.findall(r'"config:([^"]+)"', text))
    assert "model.value.rounds" in keys
    for key in keys:
        section, name = key.split(".value.")
        assert name in plain[section], key


def test_the_script_saves_a_workspace_and_a_report(
    server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    main(project="p", entity="me", group="rounds")
    workspace, report = server.views
    assert workspace["type"] == "project-view" and workspace["projectName"] == "p"
    assert len(panels(json.loads(workspace["spec"]))) > 10
    filters = json.dumps(json.loads(workspace["spec"])["section"]["runSets"])
    assert '"jobType"' in filters and '"train"' in filters and '"rounds"' in filters
    assert report["type"] == "runs" and "sweep/plot" in report["spec"]
    urls = capsys.readouterr().out.split()
    assert len(urls) == 2 and all(url.startswith(server.url) for url in urls)
    main(project="p", entity="me", report=False)
    assert len(server.views) == 3


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="wandb login"):
        main(project="p", entity="me")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", None)
    with pytest.raises(UserError, match=r'pip install "mogrifier_lm\[dashboards\]"'):
        dashboard.build_workspace("p", "me")
