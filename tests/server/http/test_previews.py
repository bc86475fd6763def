"""Responses with previews: server-sent events and multipart/x-mixed-replace."""

from __future__ import annotations

import asyncio
import base64
import email
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save

from engines.errors import DecodeError
from engines.runtime.protocol import Slot
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.errors import DeadlineError
from server.http.previews import EventStream
from server.stream import ImageStream, Preview
from tests.server.conftest import IMAGE, SIZE, Running, Serve, make_latent, simulated
from tests.server.runtimes import ControlledRuntime, PacedRuntime
from tests.waiting import until

HEADERS = {"Content-Type": "application/x-safetensors"}
BODY = save({"latent": make_latent()})
LARGE = Size(768, 1024)


def read_events(text: str) -> list[tuple[str, dict]]:
    """Parse server-sent events with JSON data."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def read_parts(response: httpx.Response, content: bytes) -> list[email.message.Message]:
    head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
    return email.message_from_bytes(head + content).get_payload()  # type: ignore[return-value]


def open_image(data: bytes | str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def read_paced(serve: Serve, separator: bytes, options: dict, accept: str) -> tuple[httpx.Response, bytes]:
    """Decode on a `PacedRuntime` and read each preview in time; `separator` follows each of them."""
    runtime = PacedRuntime({LARGE: SimulatedCost()})
    with serve(runtime) as running:
        runtime.paced = True
        headers = HEADERS | {"Accept": accept}
        body = save({"latent": make_latent(16, 24, 32)})
        with running.client.stream("POST", "/decode", content=body, params=options, headers=headers) as response:
            content, seen = b"", 0
            for chunk in response.iter_raw():
                content += chunk
                while content.count(separator) > seen:
                    seen += 1
                    runtime.read.release()
    return response, content


class TestEvents:
    @pytest.mark.parametrize(
        ("options", "accept"),
        [({"preview": "steps"}, {}), ({}, {"Accept": "text/event-stream"}), ({"preview": "steps"}, {"Accept": "*/*"})],
    )
    def test_previews_of_the_steps_precede_the_image(self, server: Running, options: dict, accept: dict):
        parameters = {"seed": 5, **options}
        response = server.client.post("/decode", content=BODY, params=parameters, headers=HEADERS | accept)
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Seed"] == "5"
        assert response.headers["Cache-Control"] == "no-store"
        *previews, (name, image) = read_events(response.text)
        assert name == "image"
        assert {name for name, _ in previews} <= {"preview"}
        assert [preview["step"] for _, preview in previews] == sorted({preview["step"] for _, preview in previews})
        for _, preview in previews:
            assert preview["steps"] == 4
            assert preview["index"] == 0
            assert (preview["width"], preview["height"]) == open_image(preview["data"]).size == SIZE[::-1]
            assert open_image(preview["data"]).format == "JPEG"
            assert preview["media_type"] == "image/jpeg"
            assert 0 < preview["latency_ms"] <= image["latency_ms"]
        assert image["seed"] == 5
        assert image["media_type"] == "image/png"
        assert "denoise;dur=" in image["server_timing"]
        assert (np.asarray(open_image(image["data"])) == IMAGE).all()

    def test_each_step_has_its_preview_if_the_client_reads_in_time(self, serve: Serve):
        _, content = read_paced(serve, b"\n\n", {"steps": 3}, "text/event-stream")
        *previews, (name, _) = read_events(content.decode())
        assert name == "image"
        assert [(data["step"], data["steps"]) for _, data in previews] == [(1, 3), (2, 3), (3, 3)]
        assert [(data["width"], data["height"]) for _, data in previews] == [(512, 384)] * 3
        levels = [np.asarray(open_image(data["data"])).mean() for _, data in previews]
        assert levels == pytest.approx([40, 80, 120], abs=3)

    def test_the_format_of_the_image_is_that_of_the_request(self, server: Running):
        response = server.decode(preview="steps", format="raw")
        name, image = read_events(response.text)[-1]
        assert (name, image["media_type"]) == ("image", "application/octet-stream")
        assert image["shape"] == [*SIZE, 3]
        assert base64.b64decode(image["data"]) == IMAGE.tobytes()

    def test_a_batch_has_the_previews_and_images_of_all_latents(self, server: Running):
        response = server.decode(make_latent(3, 16, 2, 2), preview="steps", seed=7)
        events = read_events(response.text)
        images = [data for name, data in events if name == "image"]
        assert sorted((image["index"], image["seed"]) for image in images) == [(0, 7), (1, 8), (2, 9)]
        assert response.headers["X-Seed"] == "7, 8, 9"
        for index in range(3):
            names = [name for name, data in events if data["index"] == index]
            assert names == ["preview"] * (len(names) - 1) + ["image"]

    def test_an_image_that_fails_before_its_first_preview_is_a_problem_with_its_status(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.error = DecodeError("The decoder failed on this image.")
            response = running.decode(preview="steps")
        assert response.status_code == 500
        assert response.json()["code"] == "decode-failed"

    def test_a_rejected_request_has_its_status(self, serve: Serve):
        with serve(simulated(costs={SIZE: SimulatedCost(step=1.0)})) as running:
            response = running.decode(preview="steps", deadline_ms=10)
        assert response.status_code == 422
        assert response.headers["Content-Type"] == "application/problem+json"

    def test_a_disconnected_client_cancels_the_decode(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            url = "/decode?preview=steps"
            with running.client.stream("POST", url, content=BODY, headers=HEADERS) as response:
                next(response.iter_raw())
                steps = runtime.steps
            assert steps
            response = running.decode()  # the next one is not affected
            assert response.status_code == 200
            until(lambda: running.service.undelivered.requests == 0)


class TestMixedReplace:
    @pytest.mark.parametrize(
        ("options", "accept", "kind"),
        [
            ({}, "multipart/x-mixed-replace", "image/png"),
            ({"preview": "steps"}, "image/webp, image/png;q=0.5", "image/webp"),
        ],
    )
    def test_each_part_arrives_with_the_boundary_that_completes_it(
        self, serve: Serve, options: dict, accept: str, kind: str
    ):
        response, content = read_paced(serve, b"\r\n--", {"seed": 3, **options}, accept)  # waits for each boundary
        assert response.headers["Content-Type"].startswith("multipart/x-mixed-replace; boundary=")
        *previews, image = read_parts(response, content)
        assert [part["X-Step"] for part in previews] == ["1", "2", "3", "4"]
        for part in previews:
            assert part["Content-Type"] == "image/jpeg"
            assert part["X-Steps"] == "4"
            assert float(part["X-Latency-Ms"]) > 0
            assert open_image(part.get_payload(decode=True)).size == (512, 384)
        assert image["Content-Type"] == kind
        assert image["X-Seed"] == "3"
        assert open_image(image.get_payload(decode=True)).size == (1024, 768)


class TestNegotiation:
    @pytest.mark.parametrize("accept", ["application/json", "application/zip", "multipart/mixed", "text/html"])
    def test_other_containers_have_no_previews(self, server: Running, accept: str):
        response = server.client.post(
            "/decode", content=BODY, params={"preview": "steps"}, headers=HEADERS | {"Accept": accept}
        )
        assert response.status_code == 406
        assert "accept text/event-stream or multipart/x-mixed-replace" in response.json()["detail"]

    def test_the_other_protocols_have_no_previews(self, server: Running):
        latent = make_latent()[None]
        tensor = {"name": "latent", "shape": list(latent.shape), "datatype": "FP32", "data": latent.flatten().tolist()}
        responses = [
            server.client.post("/v2/models/simulated/infer", params={"preview": "steps"}, json={"inputs": [tensor]}),
            server.client.post(
                "/remote-decode",
                params=[
                    ("preview", "steps"),
                    ("do_scaling", "true"),
                    ("dtype", "float32"),
                    *(("shape", side) for side in latent.shape),
                ],
                content=latent.numpy().tobytes(),
                headers={"Content-Type": "tensor/binary"},
            ),
        ]
        for response in responses:
            assert response.status_code == 422
            assert "Previews are sent by POST /decode only" in response.text

    def test_a_request_without_previews_computes_none(self, serve: Serve):
        class Counting(SimulatedRuntime):
            previews = 0

            def preview(self, slot: Slot) -> np.ndarray:
                self.previews += 1
                return super().preview(slot)

        runtime = Counting({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            warm_up = runtime.previews
            assert running.decode(preview="none").status_code == 200
            assert running.decode(make_latent(2, 16, 2, 2)).status_code == 200
            assert runtime.previews == warm_up
            assert running.decode(preview="steps", steps=3).status_code == 200
            assert runtime.previews == warm_up + 3

    def test_a_failed_preview_does_not_fail_the_image(self, serve: Serve, caplog: pytest.LogCaptureFixture):
        class Broken(SimulatedRuntime):
            broken = False

            def preview(self, slot: Slot) -> np.ndarray:
                if self.broken:
                    raise DecodeError("The decoder failed on this image.")
                return super().preview(slot)

        runtime = Broken({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.broken = True
            events = read_events(running.decode(preview="steps").text)
        assert [name for name, _ in events] == ["image"]
        assert "no preview of an image" in caplog.text


class TestSlowReaders:
    """What the layout sends while previews arrive faster than it is read."""

    def test_they_get_the_newest_preview_and_the_image(self):
        async def read() -> list[tuple[str, dict]]:
            stream = ImageStream(1, "image/png")
            stream.add_preview(Preview(1, 4, SIZE, b"one"))
            await asyncio.sleep(0)
            begun = await EventStream().begin([stream], "id")
            chunks = aiter(begun.body)
            received = [await anext(chunks)]
            for step in (2, 3):  # the reader is busy with the first one
                stream.add_preview(Preview(step, 4, SIZE, b"more"))
            await asyncio.sleep(0)
            while not received[-1].endswith(b"\n\n") or b'"step": 3' not in b"".join(received):
                received.append(await anext(chunks))
            stream.add_preview(Preview(4, 4, SIZE, b"last"))
            stream.push(b"image")
            stream.end()
            received += [chunk async for chunk in chunks]
            return read_events(b"".join(received).decode())

        events = asyncio.run(read())
        assert [(name, data.get("step")) for name, data in events] == [
            ("preview", 1),
            ("preview", 3),
            ("image", None),
        ]
        assert base64.b64decode(events[-1][1]["data"]) == b"image"

    def test_previews_that_are_not_read_are_not_kept(self):
        async def newest() -> Preview | None:
            stream = ImageStream(1, "image/png")
            for step in range(1, 5):
                stream.add_preview(Preview(step, 4, SIZE, bytes(1000)))
            await asyncio.sleep(0)
            preview = stream.take_preview()
            assert stream.take_preview() is None
            return preview

        preview = asyncio.run(newest())
        assert preview is not None
        assert preview.step == 4

    def test_a_preview_that_was_overtaken_by_a_later_one_is_left_out(self):
        async def steps() -> list[int | None]:
            stream = ImageStream(1, "image/png")
            taken = []
            for step in (2, 1, 3):
                stream.add_preview(Preview(step, 4, SIZE, b"jpeg"))
                await asyncio.sleep(0)
                preview = stream.take_preview()
                taken.append(preview and preview.step)
            return taken

        assert asyncio.run(steps()) == [2, None, 3]

    def test_an_image_whose_last_chunk_cannot_be_sent_ends_with_an_error(self, monkeypatch: pytest.MonkeyPatch):
        async def end() -> None:
            stream, ended = ImageStream(1, "image/png"), []
            stream.on_end(lambda: ended.append(stream.error))
            send = stream._send

            def refuse(item: object) -> None:
                monkeypatch.setattr(stream, "_send", send)
                raise MemoryError

            monkeypatch.setattr(stream, "_send", refuse)
            with pytest.raises(MemoryError):
                stream.end(b"last")
            assert (stream.ended, stream.pushed, ended) == (False, 0, [])
            error = DeadlineError("The deadline passed.")
            stream.fail(error)
            assert ended == [error]
            with pytest.raises(DeadlineError):
                await stream.chunk()

        asyncio.run(end())

    def test_an_error_after_a_preview_is_the_last_event(self):
        async def read() -> list[tuple[str, dict]]:
            stream = ImageStream(1, "image/png")
            stream.add_preview(Preview(1, 4, SIZE, b"one"))
            await asyncio.sleep(0)
            begun = await EventStream().begin([stream], "id")
            stream.fail(DeadlineError("The deadline passed."))
            return read_events(b"".join([chunk async for chunk in begun.body]).decode())

        (first, _), (second, data) = asyncio.run(read())
        assert (first, second) == ("preview", "problem")
        assert data["problem"]["status"] == 504
        assert data["problem"]["request_id"] == "id"
