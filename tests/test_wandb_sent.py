"""What W&B is sent, name by name, as dashboards, saved views and scripts of users rely on it.

wandb_sent.json holds it, for a run of a sweep and for the sweep's summary run. To write it anew:
python -m tests.test_wandb_sent
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.conftest import ROOT, write_text
from tests.wandb_stand_in import API_KEY, WandbStandIn

FILE = Path(__file__).with_name("wandb_sent.json")
ARGUMENTS = [
    "-m", "data=text", "data.dir=text", "data.cache_dir=cache", "model.hidden_size=8",
    "trainer.batch_size=4", "trainer.bptt=8", "trainer.max_epochs=null", "trainer.max_steps=4",
    "trainer.valid_every=2", "trainer.log_every=2", "trainer.threads=1",
    "optimizer.averaging=ema", "evaluators=[static,rounds]", "tracker.project=theirs",
    "tracker.mode=online", "tracker.tags=[mine]", "tracker.artifacts=true", "tracker.samples=2",
    "model.rounds=0,1", "hydra.sweep.dir=my-sweep",
]  # fmt: skip


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key == "value" or not isinstance(value, dict) or not value:
            yield prefix + key
        else:
            yield from _names(value, f"{prefix}{key}/")


def _described(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was sent, without its figures."""
    config = {k: v["value"] for k, v in run["config"].items()}
    own = config.pop("_wandb")
    metrics = own.get("m", [])  # by the numbers of wandb's protocol: 1 name, 2 glob, 5 axis, 6 how
    hidden = 2
    return {
        "project": run["project"],
        "group": run["groupName"],
        "job type": run["jobType"],
        "name": run["displayName"],
        "tags": run["tags"],
        "config": sorted(_names(config)),
        "hidden axes": sorted(m["1"] for m in metrics if "1" in m and hidden in m["6"]),
        "axes": {m["2"]: metrics[m["5"] - 1]["1"] for m in metrics if "2" in m},
        "history": sorted({k for row in run["history"] for k in row if k[0] != "_"}),
        "summary": sorted(k for k in run["summary"] if k[0] != "_"),
        "best": {k: sorted(v) for k, v in run["summary"].items() if k == "valid/ppl"},
        "exit": run["exit"],
    }


def sent(folder: Path) -> dict[str, Any]:
    """What a sweep of two runs sends: the second run, and the summary run."""
    write_text(folder / "text", 400, 60, vocab_size=200)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {
        f"{name}": str(folder / "home")
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    }
    with WandbStandIn() as server:
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *ARGUMENTS],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs = list(server.runs.values())
        artifacts = [
            {
                "name": name.replace(key, "RUN_ID"),
                "type": artifact["artifactTypeName"],
                "files": sorted(f for f in artifact["files"]),
                "metadata": sorted(json.loads(artifact["metadata"])),
            }
            for name, artifact in server.artifacts.items()
            for key, run in server.runs.items()
            if key in name and run["displayName"].endswith("rounds=1")
            if artifact["artifactTypeName"] == "model"
        ]
    assert len(runs) == 3
    (run,) = (r for r in runs if r["displayName"].endswith("rounds=1"))
    (report,) = (r for r in runs if r["jobType"] == "report")
    return {"run": _described(run), "artifacts": artifacts, "report": _described(report)}


def test_wandb_is_sent_what_it_was(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    found, written = sent(tmp_path), json.loads(FILE.read_text())
    for part in ("run", "report"):  # a new option is one more name; none goes
        gone = set(written[part].pop("config")) - set(found[part].pop("config"))
        assert not gone, f"{part}: config {gone}"
        assert found[part] == written[part]
    assert found["artifacts"] == written["artifacts"]


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        FILE.write_text(json.dumps(sent(Path(scratch)), indent=1) + "\n")
