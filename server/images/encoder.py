"""From rows on the host to bytes on the wire: PNG strips in parallel, sent in order, while later rows still arrive."""

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
from server.images import png
from server.images.formats import ImageFormat
from server.images.pillow import encode_jpeg, encode_webp
from server.stream import ImageStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    format: ImageFormat = "png"
    compression: png.Compression = "fast"
    quality: int = 90
    text: Mapping[str, str] = field(default_factory=dict)  # PNG text chunks


class Encoder:
    """A pool of threads that encodes finished images. The encoders release the GIL."""

    def __init__(self, threads: int, before_strip: Callable[[], None] = lambda: None) -> None:
        """`before_strip` is called on the thread that is about to encode."""
        self._before_strip = before_strip
        self._pool = ThreadPoolExecutor(threads, "encode", initializer=_lower_priority)

    def encode(self, rows: Rows, stream: ImageStream, encoding: Encoding) -> None:
        """Encode `rows` into `stream` and close them; returns at once. Whatever happens, the stream ends."""
        if encoding.format == "png":
            _PngTask(rows, stream, encoding, self._before_strip).submit(self._pool)
        else:
            self._pool.submit(_encode_whole, rows, stream, encoding, self._before_strip)

    def warm_up(self) -> None:
        """Compile the kernels, where no cache has them: this takes half a minute, during which probes are served."""
        png.warm_up()

    def measure(self, rows: Rows) -> None:
        """Encode `rows` as a PNG on this thread and close them; for learning what that costs."""
        try:
            rows.wait(rows.pixels.shape[0])
            png.encode(rows.pixels)
        finally:
            rows.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=False)


class _PngTask:
    """One PNG: its strips are encoded in any order and pushed in theirs."""

    def __init__(self, rows: Rows, stream: ImageStream, encoding: Encoding, before_strip: Callable[[], None]) -> None:
        self._rows, self._stream, self._encoding, self._before_strip = rows, stream, encoding, before_strip
        height, width, _ = rows.pixels.shape
        self._bounds = png.strip_bounds(width, height)
        self._strips: dict[int, png.Strip] = {}  # encoded, waiting for the ones before them
        self._checksums: list[png.Checksum] = []
        self._left = len(self._bounds)
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def submit(self, pool: ThreadPoolExecutor) -> None:
        height, width, _ = self._rows.pixels.shape
        self._head = png.png_head(width, height, self._encoding.text)
        for number in range(len(self._bounds)):
            pool.submit(self._strip, number)

    def _strip(self, number: int) -> None:
        try:
            if not self._stream.ended:
                self._encode(number)
        except BaseException as error:  # an stream must end whatever an encoder thread meets
            self._stream.fail(_as_pid_error(error))
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._rows.close()

    def _encode(self, number: int) -> None:
        self._before_strip()
        start, stop = self._bounds[number]
        self._rows.wait(stop)
        pixels = self._rows.pixels
        above = pixels[start - 1] if start else None
        strip = png.encode_strip(pixels[start:stop], above, self._encoding.compression)
        with self._lock:
            self._strips[number] = strip
            self._flush()

    def _flush(self) -> None:
        while (number := len(self._checksums)) in self._strips:
            strip = self._strips.pop(number)
            self._checksums.append(strip.checksum)
            self._stream.push(self._head + strip.data if number == 0 else strip.data)
        if len(self._checksums) == len(self._bounds):
            self._stream.encoded(self._began, time.monotonic())
            self._stream.push(png.png_tail(self._checksums))
            self._stream.end()


def _lower_priority() -> None:
    """Lower this thread's priority: an image can wait a millisecond for a core, refusals and the next step cannot."""
    if sys.platform == "linux":  # where a priority can be that of a thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _encode_whole(rows: Rows, stream: ImageStream, encoding: Encoding, before: Callable[[], None]) -> None:
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
    except BaseException as error:  # an stream must end whatever an encoder thread meets
        stream.fail(_as_pid_error(error))
    finally:
        rows.close()


def _as_pid_error(error: BaseException) -> PidError:
    if isinstance(error, PidError):
        return error
    log.error("an encoder thread failed", exc_info=error)
    return DecodeError("The image was decoded but could not be encoded.")
