"""Reads on a thread of their own: callers wait for a limited time, and calls do not overlap."""

from __future__ import annotations

import threading
import time

import pytest

from server.process.background import BackgroundReader


def test_the_result_is_returned():
    reader = BackgroundReader("test", lambda: 7, timeout=60)
    assert [reader.request()() for _ in range(3)] == [7, 7, 7]


def test_an_exception_is_raised_in_the_caller_and_the_thread_continues():
    results = iter([ValueError("first"), 2])

    def read() -> int:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    reader = BackgroundReader("test", read, timeout=60)
    with pytest.raises(ValueError, match="first"):
        reader.request()()
    assert reader.request()() == 2


def test_while_a_call_hangs_there_is_no_result_and_no_second_call():
    now, calls = 0.0, []
    entered, released = threading.Event(), threading.Event()

    def read() -> int:
        calls.append(now)
        entered.set()
        released.wait()
        return len(calls)

    reader = BackgroundReader("test", read, timeout=5, clock=lambda: now)
    wait = reader.request()
    assert entered.wait(60)
    now = 5.0  # the timeout counts from the beginning of the call
    assert wait() is None
    assert reader.request()() is None
    assert calls == [0.0]
    released.set()
    while reader.request()() is None:
        time.sleep(0.001)
    assert calls[:2] == [0.0, 5.0]


def test_callers_during_a_call_share_its_result():
    released = threading.Event()
    reader = BackgroundReader("test", lambda: (released.wait(), object()), timeout=60)
    waits = [reader.request() for _ in range(3)]
    released.set()
    first, *others = [wait() for wait in waits]
    assert all(other is first for other in others)
