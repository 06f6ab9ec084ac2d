"""What a signal does to a run that a command has started: it ends, and can be gone on with."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from mogrifier_lm.errors import UserError
from mogrifier_lm.training.signals import ENDING

QUEUES = (signal.SIGUSR1, signal.SIGUSR2)  # warnings of a queue, which submitit may handle
TRIES = 3


class Interrupted(BaseException):
    """A signal has ended the run; no Exception, which would be taken for a failure of the run.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def endable() -> Iterator[None]:
    """Let signals of ENDING end what is done here by an exception; a second one ends the process.

    Ctrl-C stays KeyboardInterrupt. Signals that were ignored stay so. Where submitit has taken a
    queue's warning, what it does is done: the job is queued again and ends.
    """
    before: dict[signal.Signals, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        for each in ENDING:
            handler = signal.getsignal(each)
            if each != signal.SIGINT and handler not in (signal.SIG_IGN, None):
                queue = each in QUEUES and callable(handler) and handler is not _end_all
                before[each] = signal.signal(each, _queued_again(handler) if queue else end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _queued_again(handler: Any) -> Callable[[int, FrameType | None], None]:
    """submitit's handler, which calls `scontrol requeue` and ends the process."""

    def again(number: int, frame: FrameType | None) -> None:
        # SLURM ends the job when it is queued again, by a SIGTERM to all its processes: scontrol,
        # which inherits this, would die of it before it is done, and the job never come back.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for left in reversed(range(TRIES)):
            try:
                handler(number, frame)
                return
            except (OSError, subprocess.SubprocessError) as error:
                if not left:
                    raise UserError(
                        f"the queue did not take the run again ({error}): the same command goes on "
                        "with it"
                    ) from error
                time.sleep(1)

    return again


def end_with_workers() -> None:
    """Let what ends this process end those that a launcher has started, as it ends a run.

    They would go on without it, unseen, and hold their folders. Ctrl-C reaches them by itself.
    """
    for each in ENDING:
        if each != signal.SIGINT and signal.getsignal(each) == signal.SIG_DFL:
            signal.signal(each, _end_all)


def _end_all(number: int, frame: FrameType | None) -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, number)
    end_by(number)


def end_by(number: int) -> NoReturn:
    """End this process as the signal would have, so that who waits for it sees why."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)  # as a shell would say it, where the signal is blocked
