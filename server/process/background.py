"""Reads that may hang, such as calls into a driver, on a thread that nothing else waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundReader(Generic[T]):
    """Daemon thread, started in advance, that calls one function; callers wait for its result for a limited time.

    While a call hangs, further requests get no result at once, and no second call is made. The thread lives as long as
    the process, and does not delay its exit.
    """

    def __init__(
        self, name: str, read: Callable[[], T], timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the thread.

        Args:
            name: Name of the thread.
            read: Function that is called on it, without concurrency.
            timeout: Seconds that callers wait, from the beginning of the call.
            clock: Returns the time in seconds.

        Raises:
            RuntimeError: The thread cannot be started.
        """
        self._read, self._timeout, self._clock = read, timeout, clock
        self._lock = threading.Lock()
        self._calls: SimpleQueue[Future[T]] = SimpleQueue()
        self._last: Future[T] | None = None
        self._deadline = 0.0
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def request(self) -> Callable[[], T | None]:
        """Begin a call unless one is in progress, and return a function that waits for its result.

        That function returns None if the result did not arrive in time, and raises the exception of `read`.
        """
        with self._lock:
            if self._last is None or self._last.done():
                self._last, self._deadline = Future(), self._clock() + self._timeout
                self._calls.put(self._last)
            call, deadline = self._last, self._deadline

        def wait() -> T | None:
            try:
                return call.result(max(0.0, deadline - self._clock()))
            except TimeoutError:
                return None

        return wait

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.set_result(self._read())
            except BaseException as error:
                call.set_exception(error)
