"""Encoding of pixel rows on the host: PNG strips are encoded in parallel while later rows still arrive."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from engines.errors import DecodeError, PidError
from engines.runtime.protocol import Rows
from server.errors import OutOfMemoryError
from server.images import png
from server.images.formats import ImageFormat
from server.images.pillow import encode_jpeg, encode_webp
from server.stream import ImageStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    """Format and parameters with which an image is encoded."""

    format: ImageFormat = "png"
    compression: png.Compression = "fast"
    quality: int = 90
    text: Mapping[str, str] = field(default_factory=dict)  # PNG text chunks

    @property
    def kind(self) -> str:
        """Key of the cost table: the format, and for PNG the compression, which decide the cost."""
        return f"png-{self.compression}" if self.format == "png" else self.format


class Encoder:
    """Thread pool that encodes finished images. The encoders release the GIL."""

    def __init__(self, threads: int, before_strip: Callable[[], None] = lambda: None) -> None:
        """Create the pool.

        Args:
            threads: Number of threads.
            before_strip: Called on the encoder thread before each strip, and before each WebP or JPEG image.
        """
        self._before_strip = before_strip
        self._pool = ThreadPoolExecutor(threads, "encode", initializer=_lower_priority)

    def encode(self, rows: Rows, stream: ImageStream, encoding: Encoding) -> None:
        """Start to encode `rows` into `stream`; the stream always ends, and `rows` are always closed."""
        if encoding.format == "png":
            _PngTask(rows, stream, encoding, self._before_strip).submit(self._pool)
        else:
            self._pool.submit(_encode_whole, rows, stream, encoding, self._before_strip)

    def warm_up(self) -> None:
        """Compile the kernels, which takes about half a minute if they are not cached; probes work during that time."""
        png.warm_up()

    def measure(self, rows: Rows) -> None:
        """Encode `rows` as a PNG on the calling thread and close them, so that the caller can time it."""
        try:
            rows.wait(rows.pixels.shape[0])
            png.encode(rows.pixels)
        finally:
            rows.close()

    def close(self, timeout: float | None = None) -> None:
        """Finish all submitted images and end the threads.

        After `timeout` seconds, return although a thread still waits for rows, as it does if a device hangs.
        """
        closing = threading.Thread(target=self._pool.shutdown, daemon=True)  # shutdown() itself has no timeout
        closing.start()
        closing.join(timeout)


class _PngTask:
    """Encoding of one PNG: strips are encoded in any order and pushed to the stream in image order."""

    def __init__(self, rows: Rows, stream: ImageStream, encoding: Encoding, before_strip: Callable[[], None]) -> None:
        self._rows, self._stream, self._encoding, self._before_strip = rows, stream, encoding, before_strip
        height, width, _ = rows.pixels.shape
        self._bounds = png.strip_bounds(width, height)
        self._head = png.png_head(width, height, encoding.text)
        self._strips: dict[int, png.Strip] = {}  # encoded, but not pushed yet
        self._checksums: list[png.Checksum] = []  # of the strips pushed
        self._remaining = len(self._bounds)
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def submit(self, pool: ThreadPoolExecutor) -> None:
        for index in range(len(self._bounds)):
            pool.submit(self._run, index)

    def _run(self, index: int) -> None:
        try:
            if not self._stream.ended:
                self._encode(index)
        except BaseException as error:  # every stream must end, even after an unexpected exception
            self._stream.fail(_as_pid_error(error))
        finally:
            with self._lock:
                self._remaining -= 1
                last = self._remaining == 0
            if last:
                self._rows.close()

    def _encode(self, index: int) -> None:
        self._before_strip()
        start, stop = self._bounds[index]
        self._rows.wait(stop)
        pixels = self._rows.pixels
        above = pixels[start - 1] if start else None
        strip = png.encode_strip(pixels[start:stop], above, self._encoding.compression)
        with self._lock:
            self._strips[index] = strip
            self._push()

    def _push(self) -> None:
        """Push every strip whose predecessors have been pushed, and the tail after the last one."""
        while (index := len(self._checksums)) in self._strips:
            strip = self._strips.pop(index)
            self._checksums.append(strip.checksum)
            self._stream.push(self._head + strip.data if index == 0 else strip.data)
        if len(self._checksums) == len(self._bounds):
            self._stream.encoded(self._began, time.monotonic())
            self._stream.push(png.png_tail(self._checksums))
            self._stream.end()


def _lower_priority() -> None:
    """Lower this thread's priority: encoding tolerates a delay of a millisecond, the device and HTTP threads do not."""
    if sys.platform == "linux":  # the only system on which setpriority applies to a single thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _encode_whole(rows: Rows, stream: ImageStream, encoding: Encoding, before: Callable[[], None]) -> None:
    """Encode a WebP or JPEG image in one piece."""
    began = time.monotonic()
    try:
        if not stream.ended:
            before()
            rows.wait(rows.pixels.shape[0])
            encode = encode_webp if encoding.format == "webp" else encode_jpeg
            data = encode(rows.pixels, encoding.quality)
            stream.encoded(began, time.monotonic())
            stream.push(data)
            stream.end()
    except BaseException as error:  # every stream must end, even after an unexpected exception
        stream.fail(_as_pid_error(error))
    finally:
        rows.close()


def _as_pid_error(error: BaseException) -> PidError:
    if isinstance(error, PidError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError()
    log.error("an encoder thread failed", exc_info=error)
    return DecodeError("The image was decoded but could not be encoded; see the server log.")
