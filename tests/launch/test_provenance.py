"""provenance.json: complete in a checkout, silent outside one, quick."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mogrifier_lm.launch import provenance
from mogrifier_lm.launch.provenance import collect


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one committed file, code.py, on branch `trunk`."""
    for name in [n for n in os.environ if n.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("one\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "m"],
                    ["branch", "-m", "trunk"]):  # fmt: skip
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def test_a_clean_checkout(checkout: Path) -> None:
    git = collect(checkout)["git"]
    assert len(git["commit"]) == 40
    assert (git["branch"], git["dirty"], git["diff"]) == ("trunk", False, "")


def test_a_change_is_in_the_diff(checkout: Path) -> None:
    (checkout / "code.py").write_text("two\n")
    git = collect(checkout)["git"]
    assert git["dirty"]
    assert "-one\n+two\n" in git["diff"]


def test_a_new_file_makes_it_dirty(checkout: Path) -> None:
    (checkout / "new.py").touch()
    git = collect(checkout)["git"]
    assert (git["dirty"], git["diff"]) == (True, "")


def test_a_detached_head_has_no_branch(checkout: Path) -> None:
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "--detach"], check=True)
    assert collect(checkout)["git"]["branch"] is None


def test_a_large_diff_is_cut_with_a_note(checkout: Path) -> None:
    (checkout / "code.py").write_text("three\n" * 400_000)
    diff = collect(checkout)["git"]["diff"]
    assert provenance.MAX_DIFF < len(diff) < provenance.MAX_DIFF + 100
    assert "[cut: 2800" in diff[-60:]


def test_code_that_git_does_not_track_has_no_commit(checkout: Path) -> None:
    """A wheel in a virtual environment below somebody's checkout."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed.py").touch()
    assert collect(checkout / ".venv")["git"] is None


def test_outside_a_checkout_and_without_git(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collect(tmp_path)["git"] is None
    monkeypatch.setenv("PATH", "")
    assert collect(checkout)["git"] is None


def test_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=2"])
    facts = collect(tmp_path)
    assert facts == json.loads(json.dumps(facts))
    assert facts["command"] == ["train.py", "seed=2"]
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] is not None
    assert facts["versions"]["no-such-package"] is None
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert datetime.datetime.fromisoformat(facts["started"]).tzinfo is not None
    assert platform.node() not in facts["platform"].split("-")


def test_it_is_quick(checkout: Path) -> None:
    times = []
    for _ in range(3):  # a busy machine may slow one of them
        start = time.perf_counter()
        collect(checkout)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
