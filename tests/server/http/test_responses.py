"""Responses of /decode as ASGI applications: each one ends and releases its admission, however its client behaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from engines.errors import DecodeError
from server.delivery import Admission
from server.http.context import RequestContext
from server.http.layouts import SingleImage
from server.http.responses import DecodeResponse
from server.request import DecodeOptions, DecodeRequest
from server.service import DecodeService
from server.settings import Settings
from tests.server.conftest import make_latent, simulated

Test = Callable[[DecodeService, Admission], Awaitable[None]]


def run(test: Test) -> None:
    """Run `test` with an admitted image of a service whose devices never start."""

    async def main() -> None:
        service = DecodeService(Settings(bundle="."), {"device": simulated()})
        service.dispatcher.accept(True)
        request = DecodeRequest(make_latent(1, 16, 2, 2), None, DecodeOptions())
        async with asyncio.timeout(30):
            await test(service, service.submit(request, "png"))

    asyncio.run(main())


def response(service: DecodeService, admission: Admission) -> DecodeResponse:
    return DecodeResponse(admission, SingleImage(), RequestContext("id"), service.metrics)


async def never(*arguments: object) -> Message:
    """Receive or send a message, which takes forever: the client neither disconnects nor reads."""
    await asyncio.Event().wait()
    raise AssertionError


def test_a_response_that_is_cancelled_twice_releases_its_admission():
    async def test(service: DecodeService, admission: Admission) -> None:
        task = asyncio.create_task(response(service, admission)({"type": "http", "state": {}}, never, never))
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

        await response(service, admission)({"type": "http", "state": {}}, receive, send)
        assert service.undelivered.requests == 0

    run(test)
