"""Pools whose threads are started in advance."""

from __future__ import annotations

import threading

import pytest

from server.process.threads import started_pool


def test_all_threads_run_before_the_first_call():
    before = threading.active_count()
    initialised: list[str] = []
    with started_pool(3, "test", lambda: initialised.append(threading.current_thread().name)) as pool:
        assert threading.active_count() == before + 3
        names = {name.rpartition("_")[0] for name in initialised}
        assert (len(initialised), names) == (3, {"test"})
        assert sorted(pool.map(abs, range(-20, 0))) == list(range(1, 21))
        assert threading.active_count() == before + 3


def test_a_thread_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch):
    before, start = threading.active_count(), threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if threading.active_count() > before:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        started_pool(2, "test")
