"""A model that is given away is whole, and holds nothing of the machine that made it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands.export import main
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "tests/fixtures/v0", tmp_path / "v0")
    monkeypatch.chdir(tmp_path / "v0")
    return tmp_path / "v0"


@pytest.mark.parametrize("dtype, error", [("fp32", 0.0), ("bf16", 0.02)])
def test_an_exported_model_is_the_model(folder: Path, dtype: str, error: float) -> None:
    main(run="run", to="out", dtype=dtype)
    files = {
        str(f.relative_to(folder / "out")) for f in Path("out").resolve().rglob("*") if f.is_file()
    }
    assert files == {
        "README.md", "checkpoints/best/model.safetensors", "config.yaml", "counts.json",
        "statistics.safetensors", "tokenizer.json",
    }  # fmt: skip
    shutil.move("out", folder.parent / "away")
    model, given = load_model("run"), load_model(folder.parent / "away")
    assert given.output_bias.dtype == torch.float32 and not given.training
    for ours, theirs in zip(given.parameters(), model.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= error * theirs.abs().max()
    lines = Path("text/test.txt").read_text().splitlines()[:5]
    scores = given.score(lines, top=1)
    assert scores.totals.nats == pytest.approx(model.score(lines).totals.nats, rel=error + 1e-9)
    train = Path("text/train.txt").read_text()
    for word in scores:
        if not word.unk:
            times = train.count("\n") if word.word == "<eos>" else train.split().count(word.word)
            assert word.count == times


def test_its_card_says_what_the_run_says(folder: Path) -> None:
    main(run="run", to="out")
    card = Path("out/README.md").read_text()
    summary = json.loads(Path("run/summary.json").read_text())
    commit = json.loads(Path("run/provenance.json").read_text())["git"]["commit"]
    for fact in (
        f"{summary['params']:,} parameters in fp32", f"{summary['test']['dynamic']['ppl']:.2f}",
        commit, "python train.py data=text", "licence of the data: not stated",
    ):  # fmt: skip
        assert fact in card
    for path in ("out/README.md", "out/config.yaml"):
        text = Path(path).read_text()
        assert "hydra.run.dir" not in text and "data.dir=" not in text and "dir: text" not in text


def test_what_cannot_be_exported_is_one_line(folder: Path) -> None:
    for arguments, says in (
        ({"run": "run", "to": "text"}, "text is not empty"),
        ({"run": "nowhere", "to": "out"}, "nowhere"),
        ({"run": "run", "to": "out", "dtype": "fp8"}, "must be one of fp32, bf16"),
        ({"run": "run", "to": "out", "data": "elsewhere"}, "no folder elsewhere"),
    ):
        with pytest.raises(UserError, match=says):
            main(**arguments)


def test_it_is_uploaded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            sent["repo"] = name

        def upload_folder(self, folder_path: Path, repo_id: str) -> str:
            sent["files"] = {f.name for f in folder_path.rglob("*") if f.is_file()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    main(run="run", to="out", hub="me/lm")
    assert sent["repo"] == "me/lm" and {"README.md", "model.safetensors"} <= sent["files"]
