"""Previews, with both clients and a real server."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import Iterator, Sequence

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from engines.errors import DecodeError
from engines.runtime.protocol import Rows, Slot
from engines.runtime.simulated import SimulatedCost
from pid_client import (
    AsyncPidClient,
    DecodeFailedError,
    InvalidRequestError,
    OverloadedError,
    PidClient,
    Preview,
)
from tests.client.conftest import Connect
from tests.server.conftest import SIZE, Running, make_latent, run_server
from tests.server.runtimes import ControlledRuntime, PacedRuntime
from tests.server.test_encoding import cancelled
from tests.waiting import until


class FailingRuntime(PacedRuntime):
    """The second step fails once `paced`."""

    def step(self, slots: Sequence[Slot], indices: Sequence[int]) -> None:
        super().step(slots, indices)
        if self.paced and 2 in {self.steps_done[slot] for slot in slots}:
            raise DecodeError("The decoder failed on this image.")


class FinishedRuntime(PacedRuntime):
    """`finished` is set after the last step of an image."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.finished = threading.Event()

    def finish(self, slot: Slot) -> Rows:
        rows = super().finish(slot)
        self.finished.set()
        return rows


@pytest.fixture
def paced() -> Iterator[tuple[Running, PacedRuntime]]:
    """A server that waits after each step until the client has read the previews."""
    runtime = PacedRuntime({SIZE: SimulatedCost()}, max_batch=3)
    with run_server(runtime) as server:
        runtime.paced = True
        yield server, runtime
        runtime.read.release(8)  # so that the device does not wait for a client that has ended its call


class Shown:
    """Function for previews, which keeps them and lets the server continue."""

    def __init__(self, runtime: PacedRuntime) -> None:
        self.previews: list[Preview] = []
        self._runtime = runtime

    def __call__(self, preview: Preview) -> None:
        self.previews.append(preview)
        self._runtime.read.release()


class TestServer:
    def test_each_step_has_its_preview(self, connect: Connect, paced: tuple[Running, PacedRuntime]):
        server, runtime = paced
        client, shown = connect(server.url), Shown(runtime)
        image = client.decode(make_latent(), seed=7, on_preview=shown)
        assert [(preview.index, preview.step, preview.steps) for preview in shown.previews] == [
            (0, step, 4) for step in (1, 2, 3, 4)
        ]
        latencies = [preview.latency for preview in shown.previews]
        assert latencies == sorted(latencies)
        assert latencies[0] > 0
        pillow_images = [preview.pil() for preview in shown.previews]
        assert {(picture.format, picture.size) for picture in pillow_images} == {("JPEG", SIZE[::-1])}
        assert [np.asarray(picture).mean() for picture in pillow_images] == pytest.approx([40, 80, 120, 160], abs=3)
        runtime.paced = False
        assert image.data == client.decode(make_latent(), seed=7).data
        assert (image.seed, image.media_type) == (7, "image/png")

    def test_options_are_kept(self, connect: Connect, paced: tuple[Running, PacedRuntime]):
        server, runtime = paced
        shown = Shown(runtime)
        image = connect(server.url).decode(make_latent(), steps=2, format="raw", on_preview=shown)
        assert [(preview.step, preview.steps) for preview in shown.previews] == [(1, 2), (2, 2)]
        assert image.numpy().shape == (*SIZE, 3)

    def test_a_batch_has_previews_of_every_image(self, connect: Connect, paced: tuple[Running, PacedRuntime]):
        server, runtime = paced
        shown = Shown(runtime)
        images = list(connect(server.url).decode_batch(make_latent(3, 16, 2, 2), seed=5, on_preview=shown))
        assert sorted((image.index, image.seed) for image in images) == [(0, 5), (1, 6), (2, 7)]
        for index in range(3):
            assert [preview.step for preview in shown.previews if preview.index == index] == [1, 2, 3, 4]

    def test_a_slow_function_gets_the_image(self, connect: Connect):
        runtime, steps = FinishedRuntime({SIZE: SimulatedCost()}), list[int]()
        with run_server(runtime) as server:
            runtime.finished.clear()
            runtime.paced = True

            def wait(preview: Preview) -> None:
                steps.append(preview.step)
                runtime.read.release(4)
                assert runtime.finished.wait(60)

            image = connect(server.url).decode(make_latent(), on_preview=wait)
        assert image.numpy().shape == (*SIZE, 3)
        assert steps[0] == 1

    def test_an_error_of_the_function_ends_the_call_and_the_decode(
        self, connect: Connect, paced: tuple[Running, PacedRuntime]
    ):
        server, runtime = paced
        client = connect(server.url)
        for error in (KeyError("mine"), httpx.ReadError("mine"), OverloadedError(429, "mine", "mine")):

            def fail(preview: Preview, error: Exception = error) -> None:
                raise error

            before = cancelled_images(server)
            with pytest.raises(type(error)) as raised:
                client.decode(make_latent(), on_preview=fail)
            assert raised.value is error
            until(lambda before=before: cancelled_images(server) == before + 1)
            runtime.read.release()  # so that the device continues
        runtime.paced = False
        assert client.decode(make_latent()).media_type == "image/png"

    def test_an_error_after_the_first_preview_is_that_of_the_image(self, connect: Connect):
        runtime = FailingRuntime({SIZE: SimulatedCost()})
        with run_server(runtime) as server:
            runtime.paced = True
            shown = Shown(runtime)
            with pytest.raises(DecodeFailedError, match="failed on this image") as raised:
                connect(server.url).decode(make_latent(), request_id="mine", on_preview=shown)
        assert [preview.step for preview in shown.previews] == [1]
        assert (raised.value.status, raised.value.code, raised.value.index) == (500, "decode-failed", None)
        assert raised.value.request_id == "mine"

    def test_an_error_before_the_first_preview_is_that_of_the_image(self, connect: Connect):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with run_server(runtime) as server:
            runtime.error = DecodeError("The decoder failed on this image.")
            with pytest.raises(DecodeFailedError, match="failed on this image"):
                connect(server.url).decode(make_latent(), on_preview=unexpected)

    def test_a_rejected_request_has_its_error(self, connect: Connect, flux: Running):
        with pytest.raises(InvalidRequestError, match="4 channels") as raised:
            connect(flux.url).decode(make_latent(4, 8, 8), on_preview=unexpected)
        assert raised.value.code == "invalid-latent"

    def test_without_pillow_the_error_names_it(self, monkeypatch: pytest.MonkeyPatch):
        content = io.BytesIO()
        PillowImage.new("RGB", (8, 8)).save(content, "JPEG")
        preview = Preview(0, 1, 4, 0.1, content.getvalue())
        assert preview.pil().size == (8, 8)
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(ImportError, match="install the package pillow"):
            preview.pil()


class TestFunctions:
    def test_an_async_function_is_awaited(self, paced: tuple[Running, PacedRuntime]):
        server, runtime = paced

        async def run() -> list[int]:
            queue: asyncio.Queue[Preview] = asyncio.Queue(maxsize=1)

            async def receive() -> list[int]:
                steps = []
                while 4 not in steps:
                    steps.append((await queue.get()).step)
                    runtime.read.release()
                return steps

            async with AsyncPidClient(server.url) as client:
                _, steps = await asyncio.gather(client.decode(make_latent(), on_preview=queue.put), receive())
            return steps

        assert asyncio.run(run()) == [1, 2, 3, 4]

    def test_a_plain_function_is_an_error_in_the_asynchronous_client(self, paced: tuple[Running, PacedRuntime]):
        server, runtime = paced

        async def run() -> None:
            async with AsyncPidClient(server.url) as client:
                await client.decode(make_latent(), on_preview=Shown(runtime))  # type: ignore[arg-type]

        with pytest.raises(TypeError, match="await"):
            asyncio.run(run())

    def test_streams_have_no_previews(self, flux: Running):
        with PidClient(flux.url) as client, pytest.raises(TypeError, match="Unknown option on_preview"):
            client.stream(make_latent(), on_preview=unexpected).__enter__()  # type: ignore[call-arg]


def unexpected(preview: Preview) -> None:
    pytest.fail(f"There must be no preview: {preview}")


def cancelled_images(server: Running) -> float:
    return sum(cancelled(server, "client-left").values())
