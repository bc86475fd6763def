"""One image on its way from device and encoder threads to the event loop of the request that wants it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from engines.errors import PidError


@dataclass
class Timings:
    """Seconds spent in each stage; 0 until the stage is over."""

    queue: float = 0.0
    condition: float = 0.0
    denoise: float = 0.0  # all steps, with the waiting between them
    finish: float = 0.0  # to uint8 and on to the host
    encode: float = 0.0  # from the first row on the host to the last byte


class ImageStream:
    """A stream of encoded bytes that ends exactly once, with its last chunk or with an error."""

    def __init__(self, seed: int, media_type: str, on_end: Callable[[ImageStream], None] = lambda answer: None) -> None:
        self.seed = seed
        self.media_type = media_type
        self.timings = Timings()
        self.error: PidError | None = None
        self.ended = False
        self.spans: list[tuple[str, float, float]] = []  # stage, began, ended, as time.monotonic has it
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes | PidError | None] = asyncio.Queue()
        self._lock = threading.Lock()

    # From any thread.

    def push(self, chunk: bytes) -> None:
        if not self.ended:
            self._send(chunk)

    def encoded(self, began: float, ended: float) -> None:
        """Told before the end, after which nobody looks any more."""
        self.timings.encode = ended - began
        self.spans.append(("encode", began, ended))

    def end(self) -> None:
        self._finish(None)

    def fail(self, error: PidError) -> None:
        """End with `error`; without effect if the answer has ended already."""
        self._finish(error)

    def _finish(self, error: PidError | None) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended, self.error = True, error
        self._send(error)
        self._on_end(self)

    def _send(self, item: bytes | PidError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to answer
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, item)

    # On the event loop.

    async def chunk(self) -> bytes | None:
        """The next bytes, or None after the last ones. Raises the error that the answer ended with."""
        item = await self._chunks.get()
        if isinstance(item, PidError):
            raise item
        return item
