"""How one image is encoded: format and parameters, and the pieces of work into which its encoding is split."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.errors import DecodeError, PidError
from engines.runtime.protocol import CompleteRows, Rows
from engines.size import Size
from server.errors import OutOfMemoryError
from server.images import png
from server.images.arrays import npy_header, planes
from server.images.formats import MEDIA_TYPES, OutputFormat
from server.images.jpeg_xl import encode_jxl
from server.images.pillow import encode_avif, encode_jpeg, encode_webp
from server.stream import ImageStream, Preview

log = logging.getLogger(__name__)

Rank = tuple[float, int]


_PLANES = ("planes-signed", "planes-unit")
_ARRAYS = ("raw", "npy", *_PLANES)  # formats that are not compressed, so that their length is known
_STRIPED = ("png", "raw", "npy")  # formats that are encoded in strips
WHOLE: tuple[OutputFormat, ...] = ("webp", "jpeg", "avif", "jxl")  # formats whose length is known once they are encoded
_KINDS = {"npy": "raw", **dict.fromkeys(_PLANES, "planes")}  # formats that cost the same share a key


@dataclass(frozen=True)
class Encoding:
    """Format and parameters with which an image is encoded."""

    format: OutputFormat = "png"
    compression: png.Compression = "fast"
    quality: int = 90
    text: Mapping[str, str] = field(default_factory=dict)  # PNG text chunks

    @property
    def kind(self) -> str:
        """Key of the cost table: the format, and for PNG the compression, which decide the cost."""
        return f"png-{self.compression}" if self.format == "png" else _KINDS.get(self.format, self.format)

    @property
    def media_type(self) -> str:
        """Media type of the encoded image."""
        return MEDIA_TYPES[self.format]

    @property
    def dtype(self) -> str | None:
        """Type of the elements if the image is encoded as an array, otherwise None."""
        if self.format not in _ARRAYS:
            return None
        return "float16" if self.format in _PLANES else "uint8"

    def shape(self, size: Size) -> tuple[int, ...] | None:
        """Return the shape of the array as which an image is encoded, or None if it is not encoded as an array."""
        if self.format not in _ARRAYS:
            return None
        return (3, *size) if self.format in _PLANES else (*size, 3)

    def content_length(self, size: Size) -> int | None:
        """Return the number of bytes of the encoded image if they are known before it is encoded, otherwise None."""
        if self.format not in _ARRAYS:
            return None
        header = len(npy_header((*size, 3))) if self.format == "npy" else 0
        return header + 3 * size.area * (2 if self.format in _PLANES else 1)

    def held_bytes(self, size: Size) -> int:
        """Return the bytes to reserve for an image: its pixels, or its encoding if that is known to be larger."""
        return max(3 * size.area, self.content_length(size) or 0)

    def strips(self, size: Size) -> list[tuple[int, int]]:
        """Return the rows (start, stop) that one thread encodes at once; some formats are encoded in one piece."""
        return png.strip_bounds(size.width, size.height) if self.format in _STRIPED else [(0, size.height)]


PREVIEW_ENCODING = Encoding("jpeg", quality=80)


@dataclass(frozen=True)
class EncodeProgress:
    """State of the encoding of one image."""

    begun: float = 0.0  # fraction of the rows
    done: float = 0.0  # fraction of the rows
    work: float = 0.0  # thread-seconds spent on the rows that are done
    ended: bool = False  # no thread works on the image any more, finished or not


Report = Callable[[EncodeProgress], None]


def ignore_progress(progress: EncodeProgress) -> None:
    """Do nothing."""


class EncodeTask(ABC):
    """Encoding of one image in strips, which several threads may encode at once and in any order.

    Attributes:
        rank: Position in the queue; the lowest is the most urgent.
        stream: Stream that gets the encoded bytes.
        next: Index of the next strip to begin; the encoder's lock guards it, `running` and `closed`.
        running: Number of threads that are encoding a strip.
        closed: Whether the rows are released, or about to be.
    """

    def __init__(self, rows: Rows, stream: ImageStream, encoding: Encoding, rank: Rank, report: Report) -> None:
        self.rank, self.stream = rank, stream
        self.next = self.running = 0
        self.closed = False
        self._rows, self._encoding, self._report = rows, encoding, report
        self._height, self._width, _ = rows.pixels.shape
        self._bounds = encoding.strips(Size(self._height, self._width))
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._rows_begun = self._rows_done = 0
        self._work = 0.0

    @property
    def waiting(self) -> bool:
        """Whether a strip has not begun yet."""
        return self.next < len(self._bounds)

    def drop(self) -> None:
        """Begin no further strip."""
        self.next = len(self._bounds)

    def run(self, index: int, before: Callable[[], None]) -> None:
        """Call `before` and encode one strip, unless the stream has ended. Any error ends the stream."""
        start, stop = self._bounds[index]
        try:
            with self._lock:
                self._rows_begun += stop - start
            self._report(self._progress())
            if not self.stream.ended:
                self._rows.wait(stop)
                began = time.monotonic()
                before()
                last = self._encode(index, start, stop)
                with self._lock:
                    self._rows_done += stop - start
                    self._work += time.monotonic() - began
                self._report(self._progress())
                if last is not None and not self.stream.ended:
                    self._end(last)
        except BaseException as error:  # every stream must end, even after an unexpected exception
            self._fail(error)

    def close(self) -> None:
        """Release the rows and report the end."""
        close_rows(self._rows)
        self._report(self._progress(ended=True))

    @abstractmethod
    def _encode(self, index: int, start: int, stop: int) -> bytes | None:
        """Encode a strip and push what the stream can get, except for the last chunk of the image, which is returned.

        Return None if the image is not complete.
        """

    def _fail(self, error: BaseException) -> None:
        self.stream.fail(as_pid_error(error))

    def _tail(self) -> bytes:
        """Return the bytes after the last strip."""
        return b""

    def _end(self, last: bytes) -> None:
        self.stream.encoded(self._began, time.monotonic())
        self.stream.end(last + self._tail())

    def _progress(self, ended: bool = False) -> EncodeProgress:
        with self._lock:
            return EncodeProgress(self._rows_begun / self._height, self._rows_done / self._height, self._work, ended)


class StripTask(EncodeTask):
    """Format whose strips are encoded separately; they are pushed to the stream in image order."""

    def __init__(self, rows: Rows, stream: ImageStream, encoding: Encoding, rank: Rank, report: Report) -> None:
        super().__init__(rows, stream, encoding, rank, report)
        self._strips: dict[int, bytes] = {}  # encoded, but not pushed yet
        self._pushed = 0  # number of strips

    def _encode(self, index: int, start: int, stop: int) -> bytes | None:
        strip = self._encode_strip(index, start, stop)
        with self._lock:
            self._strips[index] = strip
            while self._pushed in self._strips:
                chunk = self._strips.pop(self._pushed)
                self._pushed += 1
                if self._pushed == len(self._bounds):
                    return chunk
                self.stream.push(chunk)
            return None

    @abstractmethod
    def _encode_strip(self, index: int, start: int, stop: int) -> bytes:
        """Return the bytes of a strip; those of the first one begin with the header."""


class PngTask(StripTask):
    """PNG."""

    def __init__(self, rows: Rows, stream: ImageStream, encoding: Encoding, rank: Rank, report: Report) -> None:
        super().__init__(rows, stream, encoding, rank, report)
        self._head = png.png_head(self._width, self._height, encoding.text)
        self._checksums: dict[int, png.Checksum] = {}  # by index of the strip

    def _encode_strip(self, index: int, start: int, stop: int) -> bytes:
        pixels = self._rows.pixels
        above = pixels[start - 1] if start else None
        strip = png.encode_strip(pixels[start:stop], above, self._encoding.compression)
        self._checksums[index] = strip.checksum
        return strip.data if start else self._head + strip.data

    def _tail(self) -> bytes:
        return png.png_tail(self._checksums[index] for index in range(len(self._bounds)))


class PixelsTask(StripTask):
    """The pixels themselves, raw or as an npy file; they are copied, because the rows are released at the end."""

    def _encode_strip(self, index: int, start: int, stop: int) -> bytes:
        strip = self._rows.pixels[start:stop].tobytes()
        return strip if start or self._encoding.format == "raw" else npy_header(self._rows.pixels.shape) + strip


class PlanesTask(EncodeTask):
    """Planes of float16, which are made when all rows have arrived."""

    def _encode(self, index: int, start: int, stop: int) -> bytes | None:
        last = b""
        for chunk in planes(self._rows.pixels, "signed" if self._encoding.format == "planes-signed" else "unit"):
            self.stream.push(last)
            last = chunk
        return last


class WholeTask(EncodeTask):
    """Image of a format of `WHOLE`, which is encoded in one piece."""

    def _encode(self, index: int, start: int, stop: int) -> bytes | None:
        image = encode_whole(self._rows.pixels, self._encoding)
        self.stream.content_length = len(image)
        return image


class PreviewTask(EncodeTask):
    """Preview of the image of a stream, as JPEG. It does not end the stream, unless the process is out of memory."""

    def __init__(
        self, pixels: NDArray[np.uint8], step: int, steps: int, stream: ImageStream, rank: Rank, report: Report
    ) -> None:
        super().__init__(CompleteRows(pixels), stream, PREVIEW_ENCODING, rank, report)
        self._step, self._steps = step, steps

    def _encode(self, index: int, start: int, stop: int) -> bytes | None:
        jpeg = encode_whole(self._rows.pixels, self._encoding)
        self.stream.add_preview(Preview(self._step, self._steps, Size(self._height, self._width), jpeg))
        return None

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, MemoryError):
            super()._fail(error)
        else:
            log.error("a preview could not be encoded", exc_info=error)


def encode_whole(pixels: NDArray[np.uint8], encoding: Encoding) -> bytes:
    """Encode `pixels` [H, W, 3] uint8 on the calling thread; the format is one of `WHOLE`."""
    match encoding.format:
        case "webp":
            return encode_webp(pixels, encoding.quality)
        case "avif":
            return encode_avif(pixels, encoding.quality)
        case "jxl":
            return encode_jxl(pixels)
    return encode_jpeg(pixels, encoding.quality)


_TASKS: Mapping[OutputFormat, type[EncodeTask]] = {
    "png": PngTask,
    "raw": PixelsTask,
    "npy": PixelsTask,
    "planes-signed": PlanesTask,
    "planes-unit": PlanesTask,
    **dict.fromkeys(WHOLE, WholeTask),
}


def encode_task(rows: Rows, stream: ImageStream, encoding: Encoding, rank: Rank, report: Report) -> EncodeTask:
    """Return the task that encodes `rows` in the format of `encoding`; see `Encoder.encode`."""
    return _TASKS[encoding.format](rows, stream, encoding, rank, report)


def close_rows(rows: Rows) -> None:
    """Release `rows`; an error is only logged, because the image does not need them any more."""
    try:
        rows.close()
    except Exception:
        log.exception("the rows of an image could not be released")


def as_pid_error(error: BaseException) -> PidError:
    """Return `error` if clients may see it; otherwise log it and return one that they may see."""
    if isinstance(error, PidError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError()
    log.error("an encoder thread failed", exc_info=error)
    return DecodeError("The image was decoded but could not be encoded; see the server log.")
