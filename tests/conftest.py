"""What the tests share: a small text, a cache of their own, no accounts, no network."""

import logging
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from omegaconf import DictConfig

from mogrifier_lm.config import save_config, validate
from mogrifier_lm.launch.job import compose
from mogrifier_lm.launch.tracked import tracked_run
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.texts.synthetic import VOCAB_SIZE, SyntheticLanguage
from tests.wandb_stand_in import API_KEY, WandbStandIn

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B account or hub, whatever the machine of the tester has; no handler of another test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler).__module__ == "logging":  # a command's, on what this test has captured
            root.removeHandler(handler)


@pytest.fixture
def own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, settings or WANDB_ variables of the user; a new wandb session for each test."""
    wandb = pytest.importorskip("wandb")
    from wandb.sdk.lib import wbauth

    for name in [*os.environ]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    # What is compiled and cut into tokens stays where it is.
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", f"{Path.home()}/.cache"))
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)


@pytest.fixture
def server(own_wandb: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """A W&B server, and an account there."""
    with WandbStandIn() as stand_in:
        monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        yield stand_in


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of about 3,000, 400 and 400 tokens of the synthetic language."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, 3000, 400)
    return folder


def write_text(folder: Path, train: int, rest: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Write train.txt, valid.txt and test.txt of the synthetic language, about so long."""
    folder.mkdir(parents=True, exist_ok=True)
    language = SyntheticLanguage(seed=1, vocab_size=vocab_size)
    for i, (split, size) in enumerate((("train", train), ("valid", rest), ("test", rest))):
        lines = language.sample(size, seed=i)
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `python train.py OVERRIDES` would run."""
    return compose(overrides)


def train(overrides: Sequence[str], run_dir: Path) -> list[dict[str, float]]:
    """What `python train.py OVERRIDES` does in a folder, without Hydra; its rows."""
    config = validate(compose_config(overrides))
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run_dir)
    save_config(config, folder.config)
    with pytest.MonkeyPatch.context() as patch:  # curves.png takes as long as the training
        patch.setitem(sys.modules, "matplotlib", None)
        tracked_run(config, folder, overrides)
    return list(folder.rows())


def main(script: str, arguments: Sequence[str] = ()) -> None:
    """What `python SCRIPT ARGUMENTS` does, in this process."""
    with mock.patch.object(sys, "argv", [str(ROOT / script), *arguments]):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture
def small(text_dir: Path, cache_dir: Path) -> list[str]:
    """Overrides of a run that takes a second."""
    return [
        "data=text",
        f"data.dir={text_dir}",
        f"data.cache_dir={cache_dir}",
        "model.hidden_size=12",
        "trainer.batch_size=4",
        "trainer.bptt=10",
        "trainer.max_steps=12",
        "trainer.max_epochs=null",
        "trainer.valid_every=5",
        "trainer.log_every=2",
        "tracker=none",
    ]


def table_rows(markdown: str) -> list[list[str]]:
    """The cells of the lines of markdown tables, heads and rules among them."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
