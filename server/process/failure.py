"""The exit after a failure, which must work without memory and without new threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

RESERVE_BYTES = 16 * 2**20
FORCE_SECONDS = 10.0  # after the request to exit


class FailureExit:
    """Thread, started in advance, that ends the process after `trigger` has been called.

    It first requests an orderly exit. If the process still exists ten seconds later, it is ended at once.
    """

    def __init__(
        self,
        delay: float,
        request_exit: Callable[[], None],
        force_exit: Callable[[int], object] = os._exit,
        force_seconds: float = FORCE_SECONDS,
    ) -> None:
        """Start the thread.

        Args:
            delay: Seconds from the trigger to the request to exit.
            request_exit: Requests an orderly exit.
            force_exit: Ends the process with a status.
            force_seconds: Seconds from the request to `force_exit`.
        """
        self._delay, self._request_exit = delay, request_exit
        self._force_exit, self._force_seconds = force_exit, force_seconds
        # Address space that is free again for the last responses if memory has run out; it is never written to.
        self._reserve: bytearray | None = bytearray(RESERVE_BYTES)
        self._armed = threading.Lock()
        self._armed.acquire()
        threading.Thread(target=self._run, name="failure exit", daemon=True).start()

    def trigger(self) -> None:
        """Release the reserved memory and let the thread run. Allocates nothing; call it once, from any thread."""
        self._reserve = None
        self._armed.release()

    def _run(self) -> None:
        self._armed.acquire()
        time.sleep(self._delay)
        self._request_exit()
        time.sleep(self._force_seconds)
        self._force_exit(1)
