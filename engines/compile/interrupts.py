"""Signals that end a build: SIGINT, SIGTERM and SIGHUP, as an exception so that the build cleans up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
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
        self._previous = {number: signal.signal(number, self._interrupt) for number in _handled()}
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


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Handle signals only after the block, for native code that calls back into Python and swallows exceptions."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in _handled()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _handled() -> list[signal.Signals]:
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of a build that was interrupted: 128 plus the number of the signal."""
    number: int = error.args[0] if error.args else signal.SIGINT
    return 128 + number
