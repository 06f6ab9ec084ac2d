"""The examples of CONTRIBUTING.md, applied to a copy of the repository, work as they stand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BLOCK = re.compile(r"^```(python|yaml|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:mogrifier_lm|configs)/[\w/]+\.(?:py|yaml))`")


def apply_examples(text: str, folder: Path) -> list[str]:
    """Write the blocks of a page to the files named before them; returns the files."""
    touched, where = [], 0
    for block in BLOCK.finditer(text):
        names = re.findall(
            r"`((?:mogrifier_lm|configs)/[\w/]+\.(?:py|yaml))`", text[where : block.start()]
        )
        where = block.end()
        touched += names[-1:]
        path, body = folder / touched[-1], block[2]
        if block[1] != "diff":
            assert not path.exists(), f"{path} is not new"
            path.write_text(body)
            continue
        lines = body.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        source = path.read_text()
        assert source.count(old) == 1, f"{touched[-1]} has not this once:\n{old}"
        path.write_text(source.replace(old, new))
    return touched


def test_the_examples_touch_as_few_files_as_promised(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for part in ("mogrifier_lm", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    parts = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    touched = {part.splitlines()[0]: set(apply_examples(part, tmp_path)) for part in parts}
    assert [*touched] == [
        "A data set", "A cell", "An evaluator", "An optimizer", "A regularizer"
    ]  # fmt: skip
    assert len(touched["A data set"]) == 1
    assert len(touched["A cell"]) == len(touched["An evaluator"]) == 3


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path) -> None:
    for part in ("mogrifier_lm", "configs", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    apply_examples((ROOT / "CONTRIBUTING.md").read_text(), tmp_path)
    data = tmp_path / "data/mytext"
    data.mkdir(parents=True)
    (data / "train.txt").write_text("the cat sat\nthe dog ran and ran\n" * 40)
    for split in ("valid", "test"):
        (data / f"{split}.txt").write_text("the cat ran\n")
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "MOGRIFIER_LM_DATA": str(tmp_path / "data"),
    }

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(
        "train.py", "data=mytext", "model=gru", "model.rounds=2", "model.hidden_size=8",
        "optimizer.name=adamax", "regularization.activation_l1=0.1", "trainer.batch_size=4",
        "trainer.bptt=5", "trainer.max_steps=6", "trainer.valid_every=3", "tracker=none",
        "evaluators=[static]", f"data.cache_dir={tmp_path}/cache", "hydra.run.dir=run",
    )  # fmt: skip
    shown = call("scripts/evaluate.py", "run=run", "evaluators=[static,unigram]")
    assert "unigram perplexity" in shown
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["rounds"] == 2
    ppls = [summary["test"][name]["ppl"] for name in ("static", "unigram")]
    assert ppls[0] != ppls[1] and all(1 < ppl < 30 for ppl in ppls)
