"""Output that never blocks: a thread writes lines to a file descriptor that may be full, closed or not read."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_BYTES = 4 * 2**20  # of lines that wait
_CHUNK = 64 * 2**10  # bytes per write
_RETRY_SECONDS = 0.05  # wait for a descriptor that another process has made non-blocking


class LineWriter:
    """Thread that writes lines; lines that do not fit into its queue, and those that cannot be written, are dropped."""

    def __init__(self, descriptor: int, report: Callable[[int], bytes], max_bytes: int = MAX_BYTES) -> None:
        """Start the thread.

        Args:
            descriptor: File descriptor to write to.
            report: Returns the line that reports a number of dropped lines; written once lines can be written again.
            max_bytes: Limit of the lines that wait.
        """
        self.dropped = 0
        self._descriptor, self._report, self._max_bytes = descriptor, report, max_bytes
        self._lines: deque[bytes] = deque()
        self._size = 0  # bytes of the lines that wait
        self.idle = False  # the thread has nothing to write
        self._reported = 0  # dropped lines that were reported
        self._in_line = False  # the last write ended within a line
        self._changed = threading.Condition()  # on an RLock, because a signal handler may log
        threading.Thread(target=self._run, name="log writer", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Queue a line, which ends in a newline, without waiting."""
        with self._changed:
            if self._size + len(line) > self._max_bytes:
                self.dropped += 1
                return
            self._lines.append(line)
            self._size += len(line)
            self.idle = False
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until all lines are written, but at most `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle, seconds)

    def _run(self) -> None:
        while True:
            lines, dropped = self._next_lines()
            try:
                report = [self._report(dropped - self._reported)] if dropped > self._reported else []
                self._write(b"".join(report + lines))
                self._reported = dropped
            except (OSError, MemoryError):  # nobody reads any more, or the disk is full: later lines may succeed
                with self._changed:
                    self.dropped += len(lines)

    def _next_lines(self) -> tuple[list[bytes], int]:
        """Wait for lines; return some of them, and the number of lines dropped so far."""
        with self._changed:
            while not self._lines:
                self.idle = True
                self._changed.notify_all()
                self._changed.wait()
            lines: list[bytes] = []
            size = 0
            while self._lines and (not lines or size + len(self._lines[0]) <= _CHUNK):
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            self._size -= size
            return lines, self.dropped

    def _write(self, chunk: bytes) -> None:
        view = memoryview(b"\n" + chunk if self._in_line else chunk)
        while view:
            try:
                written = os.write(self._descriptor, view)
            except BlockingIOError:
                time.sleep(_RETRY_SECONDS)
                continue
            self._in_line = written < len(view)
            view = view[written:]
