"""The pool of host buffers that finished images pass through."""

from __future__ import annotations

import threading

from engines.runtime.host_rows import BufferPool


def test_waiting_for_a_buffer_ends_when_one_is_released_and_does_not_use_it():
    pool = BufferPool(1, 16, pinned=False)
    pool.wait()
    buffer = pool.acquire()
    waited = threading.Event()
    thread = threading.Thread(target=lambda: (pool.wait(), waited.set()))
    thread.start()
    assert not waited.wait(0.05)
    pool.release(buffer)
    thread.join(60)
    assert waited.is_set()
    assert pool.acquire() is buffer
