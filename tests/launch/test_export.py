"""A model that is given away is whole, and holds nothing of the machine that made it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands.export import main
from tests.conftest import ROOT
from tests.hub_stand_in import TOKEN, HubStandIn


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
        ({"run": "run", "to": "text"}, "text is there already"),
        ({"run": "nowhere", "to": "out"}, "nowhere"),
        ({"run": "run", "to": "out", "dtype": "fp8"}, "must be one of fp32, bf16"),
        ({"run": "run", "to": "out", "data": "elsewhere"}, "no folder elsewhere"),
    ):
        with pytest.raises(UserError, match=says):
            main(**arguments)


SCORE = """
import sys
from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
text = open("text/test.txt").read()
for name in sys.argv[1:]:
    try:
        lm = load_model(name, device="cpu")
        print(lm.score(text, "text", adapt=True).totals.nats, lm.counts["<eos>"])
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_it_is_uploaded_and_loaded_by_name(folder: Path) -> None:
    """The hub's real client, against a stand-in."""
    repos = folder.parent / "repos"
    repos.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(folder.parent / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment | more, capture_output=True, text=True
        )

    export = [str(ROOT / "scripts/export.py"), "run=run", "hub=me/lm"]
    with HubStandIn(repos) as hub:
        environment |= {"HF_ENDPOINT": hub.url}
        refused = run(*export, "to=refused")
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert "error: hub=me/lm: " in refused.stderr and "hf auth login" in refused.stderr
        assert not Path("refused").exists(), "nothing is made for a hub that refuses"
        done = run(*export, "to=out", HF_TOKEN=TOKEN)
        assert done.returncode == 0 and f"{hub.url}/me/lm" in done.stdout, done.stderr
        files = [
            {str(f.relative_to(top)): f.read_bytes() for f in top.rglob("*") if f.is_file()}
            for top in (Path("out"), repos / "me/lm/main")
        ]
        assert files[0] == files[1] and len(files[0]) == 6
        done = run("-c", SCORE, "run", "me/lm", "me/nothing", "me/lm/more")
        ours, theirs, nothing, more = done.stdout.splitlines()
    assert ours == theirs
    assert nothing.startswith("no folder me/nothing, nor on the hub: ") and "404" in nothing
    assert more == "no folder me/lm/more"
    there, unreached = run("-c", SCORE, "me/lm", "me/other").stdout.splitlines()
    assert there == ours, "what was fetched once is there without a connection"
    assert unreached.startswith("no folder me/other, nor on the hub: ")
