"""Responses of /decode as ASGI applications: each one ends and releases its admission, however its client behaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from engines.errors import DecodeError
from server.delivery import Admission
from server.http.containers import JsonDocument, Multipart, ZipArchive
from server.http.context import RequestContext
from server.http.layouts import Layout, SingleImage
from server.http.previews import EventStream, MixedReplace
from server.http.protocols.kserve_request import InferRequest
from server.http.protocols.kserve_response import InferResponse
from server.http.protocols.remote_decode import Tensor
from server.http.responses import DecodeResponse
from server.images.formats import OutputFormat
from server.request import DecodeOptions, DecodeRequest
from server.service import DecodeService
from server.settings import Settings
from server.stream import Preview
from tests.server.conftest import SIZE, make_latent, simulated

Test = Callable[[DecodeService, Admission], Awaitable[None]]


def run(test: Test, images: int = 1, image_format: OutputFormat = "png") -> None:
    """Run `test` with admitted images of a service whose devices never start."""

    async def main() -> None:
        service = DecodeService(Settings(bundle="."), {"simulated": {"device": simulated()}})
        service.dispatcher.accept(True)
        request = DecodeRequest(make_latent(images, 16, 2, 2), None, DecodeOptions(), "simulated")
        async with asyncio.timeout(30):
            await test(service, service.submit(request, image_format))

    asyncio.run(main())


def response(service: DecodeService, admission: Admission, layout: Layout) -> DecodeResponse:
    return DecodeResponse(admission, layout, RequestContext("id"), service.metrics)


async def never(*arguments: object) -> Message:
    """Receive or send a message, which takes forever: the client neither disconnects nor reads."""
    await asyncio.Event().wait()
    raise AssertionError


def test_a_response_that_is_cancelled_twice_releases_its_admission():
    async def test(service: DecodeService, admission: Admission) -> None:
        task = asyncio.create_task(
            response(service, admission, SingleImage())({"type": "http", "state": {}}, never, never)
        )
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)  # the task handles the first cancellation
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.undelivered.requests == 0

    run(test)


@pytest.mark.parametrize("failed", [False, True])
def test_a_client_that_disconnects_while_a_response_waits_for_it_releases_its_admission(failed: bool):
    async def test(service: DecodeService, admission: Admission) -> None:
        (stream,) = admission.streams
        if failed:
            stream.fail(DecodeError("The decoder failed on this image."))
        else:
            stream.push(b"\x89PNG")
        sending = asyncio.Event()

        async def send(message: Message) -> None:
            sending.set()
            await never()

        async def receive() -> Message:
            await sending.wait()
            return {"type": "http.disconnect"}

        await response(service, admission, SingleImage())({"type": "http", "state": {}}, receive, send)
        assert service.undelivered.requests == 0

    run(test)


IMAGES = 4
LAYOUTS: dict[str, tuple[OutputFormat, Callable[[], Layout]]] = {
    "multipart": ("png", Multipart),
    "zip": ("png", ZipArchive),
    "json": ("png", JsonDocument),
    "events": ("png", EventStream),
    "mixed-replace": ("png", MixedReplace),
    "kserve": ("png", lambda: InferResponse(InferRequest(None, {}, [], {"image": True}), "model")),
    "kserve-json": ("png", lambda: InferResponse(InferRequest(None, {}, [], {"image": False}), "model")),
    "remote-decode": ("raw", lambda: Tensor(base64=False)),
    "remote-decode-json": ("raw", lambda: Tensor(base64=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_count_as_undelivered_until_their_bytes_are_sent(name: str):
    """A body in base64 is a third larger than its images."""
    image_format, layout = LAYOUTS[name]
    nbytes = 40_000

    async def test(service: DecodeService, admission: Admission) -> None:
        sent, held = [0], []

        async def send(message: Message) -> None:
            if message.get("body"):
                held.append(admission.held)  # before this chunk, and before the one that is not reported yet
                sent.append(sent[-1] + len(message["body"]))

        for stream in admission.streams:
            for _ in range(40):
                stream.push(bytes(nbytes // 40))
            stream.end()
        await response(service, admission, layout())({"type": "http", "state": {}}, never, send)
        reported = [0, *sent[:-2]]
        total = IMAGES * nbytes
        assert held == pytest.approx([total * (1 - part / sent[-1]) for part in reported], abs=0.02 * total)

    run(test, IMAGES, image_format)


@pytest.mark.parametrize("layout", [EventStream, MixedReplace])
def test_previews_do_not_count_as_delivered(layout: type[Layout]):
    nbytes = 40_000

    async def test(service: DecodeService, admission: Admission) -> None:
        async def send(message: Message) -> None:
            await asyncio.sleep(0)

        async def sent() -> None:
            for _ in range(50):
                await asyncio.sleep(0)

        sending = asyncio.create_task(response(service, admission, layout())({"type": "http"}, never, send))
        pixels = admission.held / IMAGES
        for stream in admission.streams:
            for step in range(1, 5):
                stream.add_preview(Preview(step, 4, SIZE, bytes(nbytes)))
                await sent()
            if stream is not admission.streams[-1]:
                stream.push(bytes(nbytes))
                stream.end()
                await sent()
        assert admission.held == pytest.approx(pixels, abs=0.1 * nbytes)  # the headers of previews count
        sending.cancel()

    run(test, IMAGES)
