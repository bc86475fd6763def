"""How one image is encoded: format and parameters, and the pieces of work into which its encoding is split."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engines.errors import DecodeError, PidError
from engines.runtime.protocol import Rows
from engines.size import Size
from server.errors import OutOfMemoryError
from server.images import png
from server.images.formats import ImageFormat
from server.images.pillow import encode_jpeg, encode_webp
from server.stream import ImageStream

log = logging.getLogger(__name__)

Rank = tuple[float, int]


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

    def strips(self, size: Size) -> list[tuple[int, int]]:
        """Return the rows (start, stop) that one thread encodes at once; only PNG is split."""
        return png.strip_bounds(size.width, size.height) if self.format == "png" else [(0, size.height)]


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
                complete = self._encode(index, start, stop)
                with self._lock:
                    self._rows_done += stop - start
                    self._work += time.monotonic() - began
                self._report(self._progress())
                if complete and not self.stream.ended:
                    self._end()
        except BaseException as error:  # every stream must end, even after an unexpected exception
            self.stream.fail(as_pid_error(error))

    def close(self) -> None:
        """Release the rows and report the end."""
        close_rows(self._rows)
        self._report(self._progress(ended=True))

    @abstractmethod
    def _encode(self, index: int, start: int, stop: int) -> bool:
        """Encode a strip and push what the stream can get; return whether the image is complete."""

    def _tail(self) -> bytes:
        """Return the bytes after the last strip."""
        return b""

    def _end(self) -> None:
        self.stream.encoded(self._began, time.monotonic())
        self.stream.push(self._tail())
        self.stream.end()

    def _progress(self, ended: bool = False) -> EncodeProgress:
        with self._lock:
            return EncodeProgress(self._rows_begun / self._height, self._rows_done / self._height, self._work, ended)


class PngTask(EncodeTask):
    """PNG; its strips are pushed to the stream in image order."""

    def __init__(self, rows: Rows, stream: ImageStream, encoding: Encoding, rank: Rank, report: Report) -> None:
        super().__init__(rows, stream, encoding, rank, report)
        self._head = png.png_head(self._width, self._height, encoding.text)
        self._strips: dict[int, png.Strip] = {}  # encoded, but not pushed yet
        self._checksums: list[png.Checksum] = []  # of the strips pushed

    def _encode(self, index: int, start: int, stop: int) -> bool:
        pixels = self._rows.pixels
        above = pixels[start - 1] if start else None
        strip = png.encode_strip(pixels[start:stop], above, self._encoding.compression)
        with self._lock:
            self._strips[index] = strip
            self._push()
            return len(self._checksums) == len(self._bounds)

    def _push(self) -> None:
        """Push every strip whose predecessors have been pushed."""
        while (index := len(self._checksums)) in self._strips:
            strip = self._strips.pop(index)
            self._checksums.append(strip.checksum)
            self.stream.push(self._head + strip.data if index == 0 else strip.data)

    def _tail(self) -> bytes:
        return png.png_tail(self._checksums)


class WholeTask(EncodeTask):
    """WebP or JPEG, which is encoded in one piece."""

    def _encode(self, index: int, start: int, stop: int) -> bool:
        encode = encode_webp if self._encoding.format == "webp" else encode_jpeg
        self.stream.push(encode(self._rows.pixels, self._encoding.quality))
        return True


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
