"""Stream of one encoded image, from device and encoder threads to the event loop of its request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from engines.errors import PidError
from engines.size import Size

T = TypeVar("T")

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


@dataclass(frozen=True)
class Preview:
    """Small image of what the decoder predicts after a step."""

    step: int  # from 1
    steps: int  # of the decode
    size: Size
    jpeg: bytes


class ImageStream:
    """Stream of chunks of bytes that ends exactly once, with its last chunk or with an error.

    It may have previews. Only the newest is kept until it is read, so that a slow reader does not use memory.

    Attributes:
        created: Time of the creation, from `time.monotonic`.
        arrived: Whether all chunks, or the error, can be read without waiting; changes on the event loop.
        news: Set on the event loop when a preview can be read and when `arrived` becomes true. May be replaced, for
            example by one that several streams share.
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
        self.created = time.monotonic()
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
        self._preview: Preview | None = None
        self._previewed = 0  # step of the newest preview
        self.arrived = False
        self.news = asyncio.Event()
        self._lock = threading.Lock()

    # From any thread

    def push(self, chunk: bytes) -> None:
        """Append bytes; ignored after the end."""
        if chunk and not self.ended:
            self.pushed += len(chunk)
            self._send(chunk)

    def add_preview(self, preview: Preview) -> None:
        """Replace the preview by one of a later step, which can be read until the image or its error has arrived."""
        self._on_loop(self._receive_preview, preview)

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

    def end(self, last: bytes = b"") -> None:
        """End the stream with its last chunk.

        A client that knows the length of the image may close the connection as soon as it has the last byte. The stream
        has ended by then, so that this does not count as a cancelled decode.
        """
        self._finish(None, last)

    def fail(self, error: PidError) -> None:
        """End the stream with `error`; no effect if it has ended already."""
        self._finish(self._explain(error))

    def _finish(self, error: PidError | None, last: bytes = b"") -> None:
        with self._lock:
            if self.ended:
                return
            self.ended, self.error = True, error
        self._send_last(last)
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        try:
            for callback in callbacks:  # before the end, so that an image is counted by the time the client has it
                callback()
        finally:
            self._send_end(error)

    def _send_last(self, chunk: bytes) -> None:
        try:
            self.pushed += len(chunk)
            if chunk:
                self._send(chunk)
        except MemoryError:
            self.pushed -= len(chunk)
            self.ended = False  # so that the stream can end with an error
            raise

    def _send_end(self, error: PidError | None) -> None:
        try:
            self._send(error)
        except MemoryError:
            self.ended = False  # so that the end can be sent again
            raise

    def _send(self, item: bytes | PidError | None) -> None:
        self._on_loop(self._receive, item)

    def _on_loop(self, function: Callable[[T], None], argument: T) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no request waits for the image
            self._loop.call_soon_threadsafe(function, argument)

    # On the event loop

    def _receive(self, item: bytes | PidError | None) -> None:
        self._chunks.put_nowait(item)
        if not isinstance(item, bytes):
            self.arrived = True
            self.news.set()

    def _receive_preview(self, preview: Preview) -> None:
        if preview.step > self._previewed:  # encoder threads may overtake each other
            self._preview, self._previewed = preview, preview.step
            self.news.set()

    def take_preview(self) -> Preview | None:
        """Return the newest preview once; None if there is no new one, or if the image has arrived."""
        preview, self._preview = self._preview, None
        return None if self.arrived else preview

    async def chunk(self) -> bytes | None:
        """Return the next bytes, or None after the last ones. Raises the error that the stream ended with."""
        item = await self._chunks.get()
        if isinstance(item, PidError):
            raise item
        return item
