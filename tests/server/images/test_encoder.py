"""The encoder's threads: order, cancellation, failures. Every stream ends once and all rows are closed once."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from engines.errors import DecodeError, PidError
from engines.size import Size
from server.errors import CancelledError, DeadlineError, UnavailableError
from server.images.available import available_formats
from server.images.encoder import Encoder
from server.images.encoding import EncodeProgress, Encoding
from server.images.formats import OutputFormat
from server.stream import ImageStream
from tests.server.images.decoding import decode
from tests.waiting import until

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 64, 3), dtype=np.uint8)  # four strips
STRIPS = 4
LOSSY = ("jpeg", "avif")
KNOWN_LENGTH = [name for name in available_formats() if name != "png"]  # before the last byte
LIMIT = 60.0


class FakeRows:
    """Rows that record each strip and wait for `arrived`."""

    def __init__(self, log: list[str], name: str = "", error: Exception | None = None) -> None:
        self.pixels = PIXELS
        self.arrived, self.waiting = threading.Event(), threading.Event()
        self.arrived.set()
        self.closed = 0
        self.progress: list[EncodeProgress] = []
        self._log, self._name, self._error = log, name, error

    def wait(self, stop: int) -> None:
        self.waiting.set()
        assert self.arrived.wait(LIMIT)
        self._log.append(self._name)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.closed += 1

    def encode(self, encoder: Encoder, rank: float = 0.0, encoding: Encoding | None = None) -> ImageStream:
        """Submit these rows; return their stream."""
        stream = ImageStream(0, "image/png")
        encoder.encode(self, stream, encoding or Encoding(), (rank, 0), self.progress.append)
        return stream


@contextlib.contextmanager
def running(threads: int = 1, before_strip: Callable[[], None] = lambda: None) -> Iterator[Encoder]:
    encoder = Encoder(threads, before_strip)
    encoder.start()
    try:
        yield encoder
    finally:
        encoder.close(LIMIT)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(LIMIT):
            await test()

    asyncio.run(main())


async def content(stream: ImageStream) -> bytes:
    """Return the encoded image. Raises the error that the stream ends with."""
    chunks = []
    while (chunk := await stream.chunk()) is not None:
        chunks.append(chunk)
    return b"".join(chunks)


async def image(stream: ImageStream) -> Image.Image:
    """Open the encoded image. Raises the error that the stream ends with."""
    return Image.open(io.BytesIO(await content(stream)))


async def error(stream: ImageStream) -> PidError:
    """Return the error that the stream ends with."""
    with pytest.raises(PidError) as raised:
        await image(stream)
    return raised.value


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("image_format", [*available_formats(), "planes-signed", "planes-unit"])
def test_an_image_is_encoded_and_its_progress_reported(threads: int, image_format: OutputFormat):
    async def test() -> None:
        with running(threads) as encoder:
            rows = FakeRows([])
            data = await content(rows.encode(encoder, encoding=Encoding(image_format, quality=100)))
            found = decode(data, image_format, Size(300, 64)).astype(int)
            assert np.abs(found - PIXELS).max() <= (0 if image_format not in LOSSY else 40)
            until(lambda: rows.closed == 1)
            until(lambda: any(progress.ended for progress in rows.progress))
            assert all(progress.begun >= progress.done for progress in rows.progress)
            last = rows.progress[-1]
            assert (last.begun, last.done, last.ended) == (1.0, 1.0, True)
            assert last.work > 0
            assert sum(progress.ended for progress in rows.progress) == 1

    run(test)


@pytest.mark.parametrize("image_format", [*KNOWN_LENGTH, "planes-signed", "planes-unit"])
def test_a_stream_has_ended_by_the_time_its_last_byte_can_be_read(image_format: OutputFormat):
    """Otherwise, a client that closes the connection after the last byte would cancel a complete image."""

    async def test() -> None:
        with running() as encoder:
            length = Encoding(image_format).content_length(Size(300, 64))
            stream, received = ImageStream(0, "image/png", content_length=length), 0
            complete = threading.Event()
            stream.on_end(lambda: complete.wait(LIMIT))  # the end waits until the reader has seen the last byte
            encoder.encode(FakeRows([]), stream, Encoding(image_format))
            while stream.content_length is None or received < stream.content_length:
                chunk = await stream.chunk()
                assert chunk is not None
                received += len(chunk)
            assert stream.ended
            complete.set()
            assert await stream.chunk() is None
            assert stream.pushed == received

    run(test)


def test_an_urgent_image_overtakes_another_at_its_next_strip():
    async def test() -> None:
        order: list[str] = []
        slow, urgent, last = (FakeRows(order, name) for name in ("slow", "urgent", "last"))
        with running() as encoder:
            slow.arrived.clear()
            streams = [slow.encode(encoder, rank=5.0)]
            until(slow.waiting.is_set)
            streams += [last.encode(encoder, rank=9.0), urgent.encode(encoder, rank=1.0)]
            slow.arrived.set()
            for stream in streams:
                await image(stream)
        assert order == ["slow", *STRIPS * ["urgent"], *(STRIPS - 1) * ["slow"], *STRIPS * ["last"]]

    run(test)


@pytest.mark.parametrize("why", [CancelledError, DeadlineError])
def test_the_strips_of_a_stream_that_has_ended_are_discarded(why: type[PidError]):
    async def test() -> None:
        order: list[str] = []
        begun, waiting, other = (FakeRows(order, name) for name in ("begun", "waiting", "other"))
        with running() as encoder:
            begun.arrived.clear()
            streams = [begun.encode(encoder, rank=1.0), waiting.encode(encoder, rank=2.0)]
            until(begun.waiting.is_set)
            for stream in streams:
                stream.fail(why("for the test"))
            assert (begun.closed, waiting.closed) == (0, 1)  # a thread still uses the first one
            assert waiting.progress == [EncodeProgress(ended=True)]
            begun.arrived.set()
            assert (await image(other.encode(encoder, rank=3.0))).size == (64, 300)
            assert [type(await error(stream)) for stream in streams] == [why, why]
        assert order == ["begun", *STRIPS * ["other"]]
        assert (begun.closed, waiting.closed, other.closed) == (1, 1, 1)
        assert 0 < begun.progress[-1].done < 1

    run(test)


def test_an_image_whose_stream_has_ended_before_is_not_encoded():
    async def test() -> None:
        order: list[str] = []
        rows, stream = FakeRows(order), ImageStream(0, "image/png")
        stream.fail(CancelledError("for the test"))
        with running() as encoder:
            encoder.encode(rows, stream, Encoding(), report=rows.progress.append)
        assert (rows.closed, order) == (1, [])
        assert rows.progress[-1].ended

    run(test)


def test_the_report_before_a_strip_may_end_the_stream():
    """This is how a deadline is checked before each strip."""

    async def test() -> None:
        order: list[str] = []
        rows, stream = FakeRows(order), ImageStream(0, "image/png")

        def report(progress: EncodeProgress) -> None:
            if progress.done == 0 and len(order) == 0:
                stream.fail(DeadlineError("for the test"))

        with running() as encoder:
            encoder.encode(rows, stream, Encoding(), report=report)
            assert isinstance(await error(stream), DeadlineError)
        assert (rows.closed, order) == (1, [])

    run(test)


class TestFailures:
    """An error fails its own image; the threads go on with the next one."""

    @pytest.mark.parametrize("raised", [RuntimeError("unexpected"), SystemExit(1)])
    @pytest.mark.parametrize("image_format", ["png", "jpeg"])
    def test_an_error_while_encoding(self, raised: Exception, image_format: str, caplog: pytest.LogCaptureFixture):
        async def test() -> None:
            with running() as encoder:
                bad, good = FakeRows([], error=raised), FakeRows([])
                encoding = Encoding(image_format)
                streams = [rows.encode(encoder, rank, encoding) for rank, rows in enumerate((bad, good))]
                assert isinstance(await error(streams[0]), DecodeError)
                assert (await image(streams[1])).size == (64, 300)
            assert (bad.closed, good.closed) == (1, 1)
            assert (bad.progress[-1].done, bad.progress[-1].ended) == (0.0, True)

        run(test)
        assert "encoder thread failed" in caplog.text

    def test_an_error_before_the_first_strip_does_not_reach_the_caller(self):
        class Broken(FakeRows):
            @property
            def pixels(self) -> np.ndarray:
                raise RuntimeError("no pixels")

            @pixels.setter
            def pixels(self, pixels: np.ndarray) -> None:
                pass

        async def test() -> None:
            with running() as encoder:
                rows = Broken([])
                assert isinstance(await error(rows.encode(encoder)), DecodeError)
                assert rows.closed == 1
                assert rows.progress == [EncodeProgress(ended=True)]
                await image(FakeRows([]).encode(encoder))

        run(test)

    def test_an_error_of_the_report_or_while_closing(self):
        class Unclosable(FakeRows):
            def close(self) -> None:
                super().close()
                raise RuntimeError("cannot be closed")

        def report(progress: EncodeProgress) -> None:
            raise RuntimeError("cannot be reported")

        async def test() -> None:
            with running() as encoder:
                await image(Unclosable([]).encode(encoder))
                rows, stream = FakeRows([]), ImageStream(0, "image/png")
                encoder.encode(rows, stream, Encoding(), report=report)
                assert isinstance(await error(stream), DecodeError)
                await image(FakeRows([]).encode(encoder))
                assert rows.closed == 1

        run(test)


def test_closing_fails_the_images_that_are_not_encoded():
    async def test() -> None:
        order: list[str] = []
        begun, waiting, late = FakeRows(order, "begun"), FakeRows(order, "waiting"), FakeRows(order, "late")
        with running() as encoder:
            begun.arrived.clear()
            streams = [begun.encode(encoder, rank=1.0), waiting.encode(encoder, rank=2.0)]
            until(begun.waiting.is_set)
            encoder.close(timeout=0.0)  # the thread is busy
            begun.arrived.set()
        streams.append(late.encode(encoder))
        for stream in streams:
            assert isinstance(await error(stream), UnavailableError)
        assert order == ["begun"]
        assert (begun.closed, waiting.closed, late.closed) == (1, 1, 1)

    run(test)


def test_no_thread_is_started_after_the_start():
    async def test() -> None:
        before = set(threading.enumerate())
        with running(3) as encoder:
            threads = set(threading.enumerate())
            assert len(threads - before) == 3
            for stream in [FakeRows([]).encode(encoder) for _ in range(8)]:
                await image(stream)
            assert set(threading.enumerate()) <= threads

    run(test)


class TestPreviews:
    def test_a_preview_is_encoded_before_less_urgent_images_and_does_not_end_the_stream(self):
        async def test() -> None:
            log: list[str] = []
            busy, later = FakeRows(log, "busy"), FakeRows(log, "later")
            busy.arrived.clear()
            progress: list[EncodeProgress] = []
            stream = ImageStream(0, "image/png")
            with running() as encoder:
                first = busy.encode(encoder, rank=0)
                await asyncio.to_thread(busy.waiting.wait, LIMIT)  # the only thread is busy
                second = later.encode(encoder, rank=2)
                encoder.encode_preview(PIXELS[:64], 1, 4, stream, (1, 0), progress.append)
                second.on_end(lambda: log.append("done" if progress else "too early"))
                busy.arrived.set()
                await content(first)
                await content(second)
                await stream.news.wait()
            preview = stream.take_preview()
            assert preview is not None
            assert (preview.step, preview.steps, preview.size) == (1, 4, Size(64, 64))
            with Image.open(io.BytesIO(preview.jpeg)) as image:
                assert (image.format, image.size) == ("JPEG", (64, 64))
            assert log[-1] == "done"
            assert progress[-1].ended
            assert progress[-1].done == 1
            assert progress[-1].work > 0
            assert not stream.ended

        run(test)

    def test_a_preview_of_a_stream_that_has_ended_is_not_encoded(self):
        async def test() -> None:
            progress: list[EncodeProgress] = []
            stream = ImageStream(0, "image/png")
            stream.fail(CancelledError("The client disconnected."))
            with running() as encoder:
                encoder.encode_preview(PIXELS, 1, 4, stream, report=progress.append)
                await asyncio.to_thread(until, lambda: progress and progress[-1].ended)
            assert progress[-1].done == 0
            assert stream.take_preview() is None

        run(test)

    @pytest.mark.parametrize(("error", "ends"), [(OSError("broken"), False), (MemoryError(), True)])
    def test_an_error_costs_the_preview_only_unless_the_process_is_out_of_memory(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, ends: bool
    ):
        def fail(pixels: object, quality: int) -> bytes:
            raise error

        async def test() -> None:
            monkeypatch.setattr("server.images.encoding.encode_jpeg", fail)
            stream = ImageStream(0, "image/png")
            progress: list[EncodeProgress] = []
            with running() as encoder:
                encoder.encode_preview(PIXELS, 1, 4, stream, report=progress.append)
                await asyncio.to_thread(until, lambda: progress and progress[-1].ended)
            assert stream.ended == ends
            assert stream.take_preview() is None

        run(test)

    def test_a_closed_encoder_ends_the_stream(self):
        async def test() -> None:
            stream = ImageStream(0, "image/png")
            with running() as encoder:
                pass
            encoder.encode_preview(PIXELS, 1, 4, stream)
            with pytest.raises(UnavailableError):
                await content(stream)

        run(test)
