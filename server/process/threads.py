"""Threads that are started in advance, so that no request depends on a new one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def started_pool(threads: int, name: str, initializer: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
    """Return a pool whose threads all run. Raises RuntimeError if one cannot be started."""
    pool = ThreadPoolExecutor(threads, name, initializer)
    everyone = threading.Barrier(threads + 1)  # a thread that waits is not idle, so each submit starts another one
    try:
        for _ in range(threads):
            pool.submit(everyone.wait)
        everyone.wait()
    except BaseException:
        everyone.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool
