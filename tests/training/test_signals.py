"""Signals that ask a run to end."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training.signals import ENDING, HeldSignals
from tests.training.test_trainer import trainer_of, weights


class Ended(Exception):
    pass


@pytest.fixture(autouse=True)
def raising() -> Iterator[None]:
    """Every signal raises; afterwards all is as it was."""

    def end(number: int, frame: Any) -> None:
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_the_step_is_ended_and_saved(number: signal.Signals, tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", {"name": "adam", "lr": 0.01}, max_steps=9)
    (tmp_path / "whole").mkdir()
    whole.fit()
    trainer = trainer_of(tmp_path, {"name": "adam", "lr": 0.01}, max_steps=9)
    update = trainer._update

    def signalled(*arguments: Any) -> None:
        if trainer.progress.step == 4:
            os.kill(os.getpid(), number)
        update(*arguments)

    trainer._update = signalled
    with pytest.raises(Ended):
        trainer.fit()
    assert RunFolder(tmp_path).last.is_file() and trainer.progress.step == 5
    trainer = trainer_of(tmp_path, {"name": "adam", "lr": 0.01}, max_steps=9)
    trainer.load()
    assert trainer.progress.step == 5
    trainer.fit()
    assert torch.equal(weights(trainer.model), weights(whole.model))


def test_a_second_one_does_not_wait() -> None:
    with pytest.raises(Ended, match=str(int(signal.SIGUSR1))), HeldSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it waited")


def test_one_that_comes_at_the_end_is_not_lost() -> None:
    with pytest.raises(Ended), HeldSignals():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_so_and_work_goes_on() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with HeldSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    signal.signal(signal.SIGUSR2, lambda *_: None)
    with HeldSignals() as signals:
        for _ in range(2):  # as where a queue's handler finds that it is not its turn
            os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.received == signal.SIGUSR2
            signals.deliver(signal.SIGUSR2)
            assert signals.received is None
