"""Signals that end a build: SIGINT, SIGTERM and SIGHUP, as an exception so that the build cleans up."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Context in which the first signal raises KeyboardInterrupt with its number; later ones are ignored.

    A second signal must not stop the clean-up after the first. Signals that were ignored before, as by nohup, still
    are. Enter the context in the main thread.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:
                self._previous[number] = handler
                signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise the exception again if a signal was received: a library may have swallowed it in a callback."""
        if self._received is not None:
            raise KeyboardInterrupt(self._received)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        for handled in self._previous:
            signal.signal(handled, signal.SIG_IGN)
        self._received = number
        self.check()


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of a build that was interrupted: 128 plus the number of the signal."""
    number: int = error.args[0] if error.args else signal.SIGINT
    return 128 + number
