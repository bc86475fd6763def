"""Waiting for something to become true."""

import contextlib
import time
from collections.abc import Callable

import httpx


def until(condition: Callable[[], bool], what: str = "a condition", seconds: float = 90.0) -> None:
    """Poll `condition`; the limit only ends a test that would hang.

    Args:
        condition: Called until it returns True.
        what: What the test waits for, as in "waited 90 s for {what}".
        seconds: The limit.
    """
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)


def responds(url: str) -> bool:
    """Return whether a GET gets status 200."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False
