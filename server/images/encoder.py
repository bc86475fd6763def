"""Threads that encode pixel rows on the host: the most urgent image first, strip by strip."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from bisect import insort
from collections.abc import Callable
from functools import partial
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from engines.runtime.protocol import Rows
from server.errors import UnavailableError
from server.images import png
from server.images.available import available_formats
from server.images.encoding import (
    PREVIEW_ENCODING,
    WHOLE,
    EncodeProgress,
    EncodeTask,
    Encoding,
    PreviewTask,
    Rank,
    Report,
    as_pid_error,
    close_rows,
    encode_task,
    encode_whole,
    ignore_progress,
)
from server.stream import ImageStream

log = logging.getLogger(__name__)


class Encoder:
    """Fixed number of threads that encode finished images. The encoders release the GIL.

    A thread that becomes free takes the next strip of the most urgent image, so that an urgent image overtakes others
    at their next strip. Strips of an image whose stream has ended are discarded.
    """

    def __init__(self, threads: int, before_strip: Callable[[], None] = lambda: None) -> None:
        """Create the encoder; images wait until `start`.

        Args:
            threads: Number of threads.
            before_strip: Called on the encoder thread before each strip, and before each image
                that is encoded in one piece.
        """
        self._before_strip = before_strip
        self._changed = threading.Condition()
        self._queue: list[EncodeTask] = []  # those with a strip that has not begun, by rank
        self._closing = False
        names = (f"encoder {number}" for number in range(threads))
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]

    def start(self) -> None:
        """Start all threads. Raises RuntimeError if the system does not allow so many."""
        for thread in self._threads:
            thread.start()

    def encode(
        self,
        rows: Rows,
        stream: ImageStream,
        encoding: Encoding,
        rank: Rank = (math.inf, 0),
        report: Report = ignore_progress,
    ) -> None:
        """Queue an image. Its stream always ends, and `rows` are always closed; errors concern this image only.

        Args:
            rows: The image.
            stream: Gets the encoded bytes. No strip begins after its end.
            encoding: Format and parameters.
            rank: The image with the lowest rank is encoded first; of equal ranks, the one that was queued first.
            report: Called from encoder threads before and after each strip, and finally with `ended`. The call before
                a strip may end the stream.
        """
        try:
            task = encode_task(rows, stream, encoding, rank, report)
            self._add(task)
        except BaseException as error:  # it must not reach the thread of the device
            stream.fail(as_pid_error(error))
            close_rows(rows)
            report(EncodeProgress(ended=True))
        else:
            stream.on_end(partial(self._discard, task))

    def encode_preview(
        self,
        pixels: NDArray[np.uint8],
        step: int,
        steps: int,
        stream: ImageStream,
        rank: Rank = (math.inf, 0),
        report: Report = ignore_progress,
    ) -> None:
        """Queue a preview of the image of `stream`; it is not encoded if the stream ends first.

        Args:
            pixels: The preview, [h, w, 3] uint8.
            step: The step that it shows the result of, from 1.
            steps: Number of steps of the decode.
            stream: Gets the preview. Errors end it.
            rank: The rank of the image.
            report: Called from an encoder thread before and after the encoding, and finally with `ended`.
        """
        try:
            self._add(PreviewTask(pixels, step, steps, stream, rank, report))
        except BaseException as error:  # it must not reach the thread of the device
            stream.fail(as_pid_error(error))

    def warm_up(self) -> None:
        """Compile the kernels, which takes about half a minute if they are not cached; probes work during that time.

        Also load the libraries of the other formats, so that this does not count as the cost of the first image.
        """
        png.warm_up()
        for name in available_formats():
            if name in WHOLE:
                encode_whole(np.zeros((8, 8, 3), np.uint8), Encoding(name))

    def measure(self, rows: Rows) -> None:
        """Encode `rows` as a PNG on the calling thread and close them, so that the caller can time it."""
        try:
            rows.wait(rows.pixels.shape[0])
            png.encode(rows.pixels)
        finally:
            rows.close()

    def measure_preview(self, pixels: NDArray[np.uint8]) -> None:
        """Encode a preview on the calling thread, so that the caller can time it."""
        encode_whole(pixels, PREVIEW_ENCODING)

    def close(self, timeout: float | None = None) -> None:
        """Fail the images that are not encoded yet, and end the threads after their current strip.

        After `timeout` seconds, return although a thread still waits for rows, as it does if a device hangs.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closing, queued = True, tuple(self._queue)
            self._changed.notify_all()
        for task in queued:
            task.stream.fail(_closed())
        for thread in self._threads:
            if thread.is_alive():
                thread.join(None if limit is None else max(0.0, limit - time.monotonic()))

    def _add(self, task: EncodeTask) -> None:
        with self._changed:
            if self._closing:
                raise _closed()
            insort(self._queue, task, key=attrgetter("rank"))
            self._changed.notify_all()

    def _discard(self, task: EncodeTask) -> None:
        """Remove an image whose stream has ended from the queue."""
        with self._changed:
            task.drop()
            if task in self._queue:
                self._queue.remove(task)
        self._close_unused(task)

    def _close_unused(self, task: EncodeTask) -> None:
        """Close `task`, once, if no thread works on it and none will."""
        with self._changed:
            if task.closed or task.running or task.waiting:
                return
            task.closed = True
        task.close()

    # On the encoder threads

    def _run(self) -> None:
        _lower_priority()
        while (taken := self._take()) is not None:
            task, index = taken
            try:
                self._run_strip(task, index)
            except BaseException:  # the other images need this thread
                log.exception("an encoder thread failed; it continues with the next image")

    def _run_strip(self, task: EncodeTask, index: int) -> None:
        try:
            task.run(index, self._before_strip)
        finally:
            with self._changed:
                task.running -= 1
            self._close_unused(task)

    def _take(self) -> tuple[EncodeTask, int] | None:
        """Wait for a strip to encode and return it. Return None once the encoder closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if self._closing:
                return None
            task = self._queue[0]
            index, task.next = task.next, task.next + 1
            task.running += 1
            if not task.waiting:
                del self._queue[0]
            return task, index


def _closed() -> UnavailableError:
    return UnavailableError("The server shut down before the image was finished; retry.")


def _lower_priority() -> None:
    """Lower this thread's priority: encoding tolerates a delay of a millisecond, the device and HTTP threads do not."""
    if sys.platform == "linux":  # the only system on which setpriority applies to a single thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
