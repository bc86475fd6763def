"""Accounting of undelivered bytes, per client and in total, with a manual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from server.delivery import Admission
from server.errors import ClientShareError, QueueFullError
from server.images.formats import OutputFormat
from server.request import DecodeOptions, DecodeRequest
from server.service import DecodeService
from server.settings import READ_RATE_WINDOW, Settings
from tests.server.conftest import OUTPUT, SIZE, make_latent, simulated

PIXELS = 3 * SIZE.area  # bytes of an image
TIMEOUT = 120.0


class Server:
    """A service whose devices never start, with costs of 1 s per step."""

    def __init__(self, images: float) -> None:
        self.now = 1000.0
        settings = Settings(bundle=".", pending_bytes=int(images * PIXELS), response_timeout=TIMEOUT)
        self.service = DecodeService(settings, {"simulated": {"device": simulated()}}, clock=lambda: self.now)
        self.service.costs.measure("step", OUTPUT, 1.0)
        self.service.dispatcher.accept(True)
        self.undelivered = self.service.undelivered

    def submit(self, client: str = "", image_format: OutputFormat = "png") -> Admission:
        request = DecodeRequest(make_latent(1, 16, 2, 2), None, DecodeOptions(), "simulated")
        return self.service.submit(request, image_format, client)

    def decoded(self, admission: Admission, nbytes: int) -> None:
        """Let the encoder end an image of `nbytes`."""
        for job in admission.jobs:
            self.service.dispatcher.query(lambda scheduler, job=job: scheduler.cancel(job))
            job.payload.stream.push(bytes(nbytes))
            job.payload.stream.end()


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


@on_a_loop
async def test_one_client_may_hold_as_much_as_it_leaves_free():
    server = Server(images=6)
    for _ in range(3):
        server.submit("greedy")
    with pytest.raises(ClientShareError):
        server.submit("greedy")
    server.submit("a")
    with pytest.raises(ClientShareError):
        server.submit("a")
    server.submit("b")  # each other client has room for at least one
    assert server.undelivered.bytes == 5 * PIXELS


@on_a_loop
async def test_without_clients_requests_may_hold_everything():
    server = Server(images=6)
    for _ in range(6):
        server.submit()
    with pytest.raises(QueueFullError, match="Undelivered responses"):
        server.submit()


@on_a_loop
async def test_an_encoded_image_counts_with_the_bytes_that_are_not_delivered_yet():
    server = Server(images=6)
    admission = server.submit("a")
    assert admission.held == PIXELS
    server.decoded(admission, 1000)
    assert server.undelivered.bytes == 1000
    admission.delivered(300)
    assert server.undelivered.bytes == 700
    admission.release()
    admission.release()
    assert (server.undelivered.bytes, server.undelivered.requests) == (0, 0)


@on_a_loop
async def test_planes_of_float16_count_as_two_images():
    server = Server(images=2)
    server.submit(image_format="planes-signed")
    assert server.undelivered.bytes == 2 * PIXELS
    with pytest.raises(QueueFullError, match="Undelivered responses"):
        server.submit(image_format="raw")


@on_a_loop
async def test_retry_after_is_the_predicted_end_of_images_that_are_not_decoded():
    server = Server(images=4)
    for _ in range(4):
        server.submit()
    with pytest.raises(QueueFullError) as rejected:
        server.submit()
    assert rejected.value.retry_after == pytest.approx(4.0)


@on_a_loop
async def test_retry_after_is_the_time_until_a_client_that_reads_nothing_is_disconnected():
    server = Server(images=4)
    for _ in range(2):
        admission = server.submit("greedy")
        server.decoded(admission, PIXELS)
        admission.delivered(0)
        admission.delivered(100)
    for waited in (5.0, 15.0):
        server.now = 1000.0 + waited
        with pytest.raises(ClientShareError) as rejected:
            server.submit("greedy")
        assert rejected.value.retry_after == pytest.approx(2 * READ_RATE_WINDOW - waited)
        assert server.undelivered.next_end("greedy") == pytest.approx(2 * READ_RATE_WINDOW - waited)
    server.submit("other")
    assert server.undelivered.next_end("nobody") is None


@on_a_loop
async def test_retry_after_follows_the_rate_at_which_clients_read():
    server = Server(images=1)
    admission = server.submit()
    server.decoded(admission, PIXELS)
    admission.delivered(0)
    server.now += 6.0
    admission.delivered(PIXELS // 4)
    with pytest.raises(QueueFullError) as rejected:
        server.submit()
    assert rejected.value.retry_after == pytest.approx(18.0)


@on_a_loop
async def test_previews_and_boundaries_do_not_count_as_a_part_of_an_image():
    server = Server(images=2)
    admission = server.submit()
    before = server.undelivered.next_end("")
    server.now += 1.0
    admission.delivered(0)
    admission.delivered(20_000)
    server.now += 1.0
    assert server.undelivered.next_end("") == before
    assert admission.held == PIXELS
