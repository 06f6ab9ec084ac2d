"""Signals that ask a run to end: held back until it can be gone on with exactly."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; a shutdown or preemption; a terminal that closes; the warnings of queues."""


class HeldSignals:
    """While this context lasts the first signal of ENDING is noted, and waits for `deliver`.

    With a second one it waits no longer. Signals that were ignored before stay so, and outside of
    the main thread, which alone gets signals, nothing is held.

    Attributes:
        received: the signal that waits; None without one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        else:
            self._restore()
            signal.raise_signal(self.received)

    def deliver(self, number: int) -> None:
        """Let a signal do what it would have done; mostly this does not return."""
        self._restore()
        signal.raise_signal(number)
        self.received = None
        self.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        if self.received is not None and kind is None:
            signal.raise_signal(self.received)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
