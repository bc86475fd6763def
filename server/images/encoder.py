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

    def encode(self, rows: Rows, answer: ImageStream, encoding: Encoding) -> None:
        """Encode `rows` into `answer` and close them; returns at once. Whatever happens, the answer ends."""
        if encoding.format == "png":
            _PngTask(rows, answer, encoding, self._before_strip).submit(self._pool)
        else:
            self._pool.submit(_encode_whole, rows, answer, encoding, self._before_strip)

    def warm_up(self) -> None:
        """Compile the kernels, where no cache has them: half a minute, during which probes are answered already."""
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

    def __init__(self, rows: Rows, answer: ImageStream, encoding: Encoding, before_strip: Callable[[], None]) -> None:
        self._rows, self._answer, self._encoding, self._before_strip = rows, answer, encoding, before_strip
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
            if not self._answer.ended:
                self._encode(number)
        except BaseException as error:  # an answer must end whatever an encoder thread meets
            self._answer.fail(_as_pid_error(error))
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
            self._answer.push(self._head + strip.data if number == 0 else strip.data)
        if len(self._checksums) == len(self._bounds):
            self._answer.encoded(self._began, time.monotonic())
            self._answer.push(png.png_tail(self._checksums))
            self._answer.end()


def _lower_priority() -> None:
    """Lower this thread's priority: an image can wait a millisecond for a core, refusals and the next step cannot."""
    if sys.platform == "linux":  # where a priority can be that of a thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _encode_whole(rows: Rows, answer: ImageStream, encoding: Encoding, before: Callable[[], None]) -> None:
    began = time.monotonic()
    try:
        if not answer.ended:
            before()
            rows.wait(rows.pixels.shape[0])
            encode = encode_webp if encoding.format == "webp" else encode_jpeg
            data = encode(rows.pixels, encoding.quality)
            answer.encoded(began, time.monotonic())
            answer.push(data)
            answer.end()
    except BaseException as error:  # an answer must end whatever an encoder thread meets
        answer.fail(_as_pid_error(error))
    finally:
        rows.close()


def _as_pid_error(error: BaseException) -> PidError:
    if isinstance(error, PidError):
        return error
    log.error("an encoder thread failed", exc_info=error)
    return DecodeError("The image was decoded but could not be encoded.")
