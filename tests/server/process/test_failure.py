"""The exit after a failure."""

from __future__ import annotations

import queue
import threading
import tracemalloc

from server.process.failure import FailureExit


def test_an_orderly_exit_is_requested_and_then_forced():
    events: queue.Queue[object] = queue.Queue()
    failure = FailureExit(0.05, lambda: events.put("request"), events.put, force_seconds=0.05)
    failure.trigger()
    assert [events.get(timeout=60) for _ in range(2)] == ["request", 1]


def test_nothing_happens_without_a_failure():
    requested = threading.Event()
    FailureExit(0, requested.set, lambda status: None)
    assert not requested.wait(0.1)


def test_the_trigger_starts_no_thread_and_frees_the_reserve():
    tracemalloc.start()
    try:
        failure = FailureExit(600, lambda: None, lambda status: None)
        threads, (before, _) = threading.active_count(), tracemalloc.get_traced_memory()
        failure.trigger()
        assert threading.active_count() == threads
        assert tracemalloc.get_traced_memory()[0] < before - 10 * 2**20
    finally:
        tracemalloc.stop()
