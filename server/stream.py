"""Stream of one encoded image, from device and encoder threads to the event loop of its request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from engines.errors import PidError

Stage = Literal["queued", "running", "encoding"]  # where an image is: running is on a device


@dataclass
class Timings:
    """Seconds spent in each stage; 0 until the stage has ended."""

    caption: float = 0.0  # from the admission until the prompt was encoded; 0 if the caption was known
    queue: float = 0.0
    condition: float = 0.0
    denoise: float = 0.0  # all steps, including the waits between them
    finish: float = 0.0  # conversion to uint8 and start of the copy to the host
    encode: float = 0.0  # from the first row on the host to the last byte


@dataclass(frozen=True)
class Span:
    """One stage of an image, for traces; times are those of `time.monotonic`."""

    stage: str
    start: float
    end: float


class ImageStream:
    """Stream of chunks of bytes that ends exactly once, with its last chunk or with an error.

    Attributes:
        content_length: Number of bytes of the encoded image, or None. For formats that are encoded in one piece, it is
            set before the first chunk can be read.
    """

    def __init__(
        self,
        seed: int,
        media_type: str,
        explain: Callable[[PidError], PidError] = lambda error: error,
        content_length: int | None = None,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
    ) -> None:
        """Create a stream on the running event loop.

        Args:
            seed: Seed of the image.
            media_type: Media type of the encoded image.
            explain: Returns the error to end with in place of the one passed to `fail`; called on the same thread.
            content_length: Number of bytes of the encoded image, if it is known before the encoding.
            shape: Shape of the array if the image is encoded as one, such as (2048, 2048, 3), otherwise None.
            dtype: Type of the array's elements, such as "uint8", otherwise None.
        """
        self.seed = seed
        self.media_type = media_type
        self.content_length, self.shape, self.dtype = content_length, shape, dtype
        self.timings = Timings()
        self.error: PidError | None = None
        self.ended = False
        self.pushed = 0  # bytes
        self.spans: list[Span] = []
        self.stage: Stage = "queued"
        self._explain = explain
        self._callbacks: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes | PidError | None] = asyncio.Queue()
        self._lock = threading.Lock()

    # From any thread

    def push(self, chunk: bytes) -> None:
        """Append bytes; ignored after the end."""
        if not self.ended:
            self.pushed += len(chunk)
            self._send(chunk)

    def push_all(self, content: bytes) -> None:
        """Push all bytes of the image at once, so that their number is known when they can be read."""
        self.content_length = len(content)
        self.push(content)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the stream ends, on the thread that ends it; at once if it has ended already."""
        with self._lock:
            if not self.ended:
                self._callbacks.append(callback)
                return
        callback()

    def add_span(self, stage: str, start: float, end: float) -> float:
        """Record a stage and return its duration in seconds."""
        self.spans.append(Span(stage, start, end))
        return end - start

    def encoded(self, start: float, end: float) -> None:
        """Record the encoding; call it before `end`, which reports the timings."""
        self.timings.encode = self.add_span("encode", start, end)

    def end(self) -> None:
        """End the stream after its last chunk."""
        self._finish(None)

    def fail(self, error: PidError) -> None:
        """End the stream with `error`; no effect if it has ended already."""
        self._finish(self._explain(error))

    def _finish(self, error: PidError | None) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended, self.error = True, error
            callbacks, self._callbacks = self._callbacks, []
        try:
            for callback in callbacks:  # first, so that an image is counted by the time the client has it
                callback()
        finally:
            self._send_end(error)

    def _send_end(self, error: PidError | None) -> None:
        try:
            self._send(error)
        except MemoryError:
            self.ended = False  # so that the end can be sent again
            raise

    def _send(self, item: bytes | PidError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no request waits for the image
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, item)

    # On the event loop

    async def chunk(self) -> bytes | None:
        """Return the next bytes, or None after the last ones. Raises the error that the stream ended with."""
        item = await self._chunks.get()
        if isinstance(item, PidError):
            raise item
        return item
