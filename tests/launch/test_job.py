"""A run as the command launches it: what stands around the core's `run`."""

import json
import logging
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from mogrifier_lm.config import save_config, validate
from mogrifier_lm.launch import job
from mogrifier_lm.launch.explain import EXPECTED, explain
from mogrifier_lm.launch.job import check_run, job_dir
from mogrifier_lm.launch.overrides import as_meant
from mogrifier_lm.launch.tracked import tracked_run
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.tracking.tracker import Tracker
from mogrifier_lm.training import checkpoint
from tests.conftest import compose_config
from tests.runs.test_run import train


@pytest.mark.usefixtures("own_wandb")
def test_the_id_in_an_older_checkpoint_is_gone_on_with(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's id was a field of the trainer's progress; now it is a file of the run."""
    config = validate(compose_config([*small, "tracker=wandb", "tracker.mode=offline"]))
    save_config(config, RunFolder(tmp_path).config)

    def cut(tracker: Tracker, metrics: Mapping[str, float]) -> None:
        if metrics["step"] > 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tracker, "log", cut)
        tracked_run(config, RunFolder(tmp_path), [])
    (tmp_path / "wandb.json").unlink()
    path = RunFolder(tmp_path).last
    tensors, values = checkpoint.load(path)
    assert "run_id" not in values["progress"]
    checkpoint.save(path, tensors, values | {"progress": values["progress"] | {"run_id": "old7"}})
    tracked_run(config, RunFolder(tmp_path), [])
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"run_id": "old7"}
    assert list(tmp_path.glob("wandb/offline-run-*-old7"))


@pytest.mark.parametrize(
    "overrides, rounds",
    [
        (["experiment=ptb_small", "model=lstm"], 0),
        (["experiment=ptb_small", "model=lstm", "model.rounds=3"], 3),
        (["experiment=ptb_small"], 4),
        (["experiment=ptb_small", "model=mogrifier"], 4),
        (["sweep=ptb_ablation", "model=lstm"], 0),
        (["model=lstm"], 0),
        (["experiment=ptb_lstm_24m"], 0),
        (["experiment=ptb_lstm_24m", "model=mogrifier"], 5),
    ],
)
def test_the_lstm_has_no_rounds_also_beside_a_recipe(overrides: list[str], rounds: int) -> None:
    assert compose_config(overrides).model.rounds == rounds


def test_a_run_says_what_stays_of_its_recipe(small: list[str], tmp_path: Path) -> None:
    """The same where Hydra composes as where `compose` does."""
    done = train(
        [*small, "experiment=ptb_small", "model=lstm", "regularization=none", "optimizer=sgd",
         "optimizer.lr=1", "regularization.output_dropout=0.1", "trainer.max_steps=1",
         "hydra.run.dir=run"], tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "run/train.log").read_text()
    assert "model=lstm: num_layers=2, skip_sum=True stay as experiment=ptb_small has them" in said
    assert (
        "regularization=none: input_dropout=0.25, inter_layer_dropout=0.25, state_dropout=0.1 "
        in said
    )
    assert "optimizer=sgd: averaging=two_tailed stay" in said
    assert " lstm rounds 0, 2 x 12" in said
    assert json.loads((tmp_path / "run/summary.json").read_text())["rounds"] == 0


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["sweep=rounds", "model.rounds=0,2", "seed=1,2"], None),
        (["hydra.mode=MULTIRUN", "trainer.bptt=0,5"], None),
        (["-m", "trainer.bptt=0"], None),
        (["sweep=rounds", "trainer.bptt=0"], None),  # each run of a sweep says it
        (["resume=somewhere", "trainer.max_steps=3"], None),
        (["model.rounds=0,2"], "Ambiguous value for argument 'model.rounds=0,2'"),
        (["trainer.bptt=0"], "trainer.bptt is 0"),
        (["experiment=ptb_small", "optimizer.lr=-1"], "optimizer.lr is -1"),
        (["data.dir=a=b(c"], "data.dir with data=synthetic"),
    ],
)
def test_a_single_run_is_checked_before_it_has_a_folder(
    arguments: list[str], told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [as_meant(argument) for argument in arguments]
    if told is None:
        check_run(arguments)
    else:
        with pytest.raises(EXPECTED) as error:
            check_run(arguments)
        assert told in explain(error.value)
    assert not [*tmp_path.iterdir()]


def claim(sweep: Path, rounds: int) -> str:
    return job_dir(str(sweep), 0, ["model.hidden_size=7", f"model.rounds={rounds}"])


def test_a_job_has_one_folder_of_its_sweep(tmp_path: Path) -> None:
    """Also where others choose at the same moment, and where a kill came before the run began."""
    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda rounds: claim(tmp_path, rounds % 8), range(16)))
    assert sorted(names[:8]) == [str(number) for number in range(8)] and names[:8] == names[8:]
    (tmp_path / "8/.hydra").mkdir(parents=True)
    (tmp_path / "8/train.log").write_text("")
    RunFolder(tmp_path / names[5]).overrides.write_text("[]")
    assert [claim(tmp_path, rounds) for rounds in (9, 9, 2, 11)] == ["8", "8", names[2], "9"]


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_run_says_what_to_do(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a run that has saved its config, one whose signal came before that."""

    def told_to_end(node: DictConfig, folder: RunFolder) -> float:
        if begun:
            folder.config.write_text("")
        os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    ended: list[int] = []
    monkeypatch.setattr(logging, "raiseExceptions", True)  # which the job sets, and is set back
    monkeypatch.setattr(job, "_job", told_to_end)
    monkeypatch.setattr(job, "end_by", ended.append)
    monkeypatch.setattr(
        job.HydraConfig, "get", lambda: OmegaConf.create({"runtime": {"output_dir": str(tmp_path)}})
    )
    job.train_job(OmegaConf.create())
    line = capsys.readouterr().err
    assert ended == [signal.SIGTERM] and "ended by SIGTERM; " in line
    assert line.endswith(
        "resume= goes on\n" if begun else "it had not begun: give the command again\n"
    )
