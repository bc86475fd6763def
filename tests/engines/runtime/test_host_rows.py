"""The pool of host buffers that finished images pass through."""

from __future__ import annotations

from engines.runtime.host_rows import BufferPool


def test_a_further_buffer_is_allocated_while_all_are_in_use_and_not_kept():
    pool = BufferPool(1, 16, pinned=False)
    buffer, further = pool.acquire(), pool.acquire()
    assert buffer.data_ptr() != further.data_ptr()
    pool.release(further)
    pool.release(buffer)
    assert pool.acquire() is buffer
    assert pool.acquire() is not further
