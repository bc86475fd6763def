"""Images that are larger than the sizes of the decoder: decoded in tiles if the server allows it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from server.request import BODY_OVERHEAD
from tests.server.conftest import LARGER, SIZE, Running, Serve, make_latent, run_server, simulated
from tests.server.http.test_previews import read_events
from tests.server.runtimes import ControlledRuntime
from tests.server.test_swaps import Closing, Source, swap
from tests.waiting import until

HUGE = Size(160, 224)  # latents of 5x7 cells
MAX_PIXELS = HUGE.area
COST = SimulatedCost()


@pytest.fixture(scope="module")
def tiled() -> Iterator[Running]:
    with run_server(simulated(max_pixels=MAX_PIXELS)) as running:
        yield running


def size_of(response) -> Size:
    assert response.status_code == 200, response.text
    width, height = Image.open(io.BytesIO(response.content)).size
    return Size(height, width)


class TestSizes:
    @pytest.mark.parametrize("latent", [(5, 7), (2, 5), (3, 2), (7, 5)])
    def test_a_latent_between_and_beyond_the_sizes_is_decoded(self, tiled: Running, latent: tuple[int, int]):
        assert size_of(tiled.decode(make_latent(16, *latent))) == Size(32 * latent[0], 32 * latent[1])

    def test_a_batch_is_decoded(self, tiled: Running):
        response = tiled.decode(make_latent(2, 16, 5, 7), format="raw")
        assert response.status_code == 200
        assert response.content.count(b"application/octet-stream") == 2

    def test_a_packed_latent_is_decoded(self, tiled: Running):
        response = tiled.decode(torch.zeros(1, 6, 64), height=32, width=48)  # 4 x 6 cells
        assert size_of(response) == Size(128, 192)

    def test_tiles_can_be_declined(self, tiled: Running):
        response = tiled.decode(make_latent(16, 5, 7), tile="never")
        assert (response.status_code, response.json()["code"]) == (422, "invalid-latent")
        assert "Larger" not in response.json()["detail"]
        assert size_of(tiled.decode(make_latent(16, 2, 4), tile="never")) == LARGER

    @pytest.mark.parametrize("latent", [(6, 7), (1, 7), (36, 1)], ids=["too many pixels", "too low", "too narrow"])
    def test_other_latents_are_rejected_with_the_limit(self, tiled: Running, latent: tuple[int, int]):
        response = tiled.decode(make_latent(16, *latent))
        assert (response.status_code, response.json()["code"]) == (422, "invalid-latent")
        assert "Larger images have at most 35,840 pixels and 16,384 per side" in response.json()["detail"]

    def test_without_the_setting_they_are_rejected(self, serve: Serve):
        with serve() as running:
            response = running.decode(make_latent(16, 5, 7))
            assert (response.status_code, response.json()["code"]) == (422, "invalid-latent")
            assert "larger" not in response.json()["detail"]
            assert running.client.get("/info").json()["decoders"][0]["max_pixels"] is None

    def test_info_has_the_limit_and_a_body_of_this_size_is_accepted(self, tiled: Running):
        info = tiled.client.get("/info").json()
        (decoder,) = info["decoders"]
        assert decoder["max_pixels"] == MAX_PIXELS
        images, caption = info["limits"]["images_per_request"], 300 * 2304
        elements = images * (16 * 35 + caption)
        assert info["limits"]["body_bytes"] == 4 * -(-4 * elements // 3) + BODY_OVERHEAD

    def test_a_decoder_is_chosen_by_the_sizes_that_it_decodes_in_tiles_too(self, serve: Serve):
        decoders = {
            "tiles": {"device": simulated(max_pixels=MAX_PIXELS)},
            "whole": {"device": simulated()},
        }
        with serve(decoders=decoders) as running:
            assert running.decode(make_latent(16, 5, 7)).status_code == 200
            assert running.decode(make_latent(16, 2, 2)).json()["code"] == "ambiguous-decoder"
            assert running.decode(make_latent(16, 5, 7), tile="never").json()["code"] == "invalid-latent"


class TestSteps:
    def test_previews_follow_each_step_and_not_each_tile(self, tiled: Running):
        response = tiled.decode(make_latent(16, 5, 7), preview="steps")
        steps = [data["step"] for event, data in read_events(response.text) if event == "preview"]
        assert steps == sorted({1, 2, 3, 4} & set(steps))  # those that the encoder cannot keep up with are left out
        assert steps

    def test_an_urgent_image_runs_between_two_tiles(self, serve: Serve):
        calls: list[Size] = []

        class Recording(ControlledRuntime):
            def step(self, slots, indices) -> None:
                calls.append(self._running[slots[0]])
                super().step(slots, indices)

        runtime = Recording({SIZE: COST}, max_batch=1, max_pixels=MAX_PIXELS)
        with serve(runtime) as running, ThreadPoolExecutor(2) as pool:
            calls.clear()
            runtime.pause()
            large = pool.submit(running.decode, make_latent(16, 5, 7), priority="batch")
            assert runtime.entered.wait(60)
            urgent = pool.submit(running.decode, priority="interactive")
            until(lambda: running.service.undelivered.requests == 2)
            runtime.resume()
            assert size_of(urgent.result()) == SIZE
            assert size_of(large.result()) == HUGE
        tiles = len(runtime.info.tiles(HUGE))
        assert calls == [HUGE, *[SIZE] * 4, *[HUGE] * (4 * tiles - 1)]

    def test_a_client_that_disconnects_stops_the_decode_before_the_next_tile(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: COST}, max_batch=1, max_pixels=MAX_PIXELS)
        with serve(runtime) as running, ThreadPoolExecutor(1) as pool:
            runtime.pause()
            response = pool.submit(running.decode, make_latent(16, 5, 7))
            assert runtime.entered.wait(60)
            before = runtime.steps
            (job,) = running.service.dispatcher.query(lambda scheduler: scheduler.ends(0.0))
            running.service.dispatcher.cancel([job])
            runtime.resume()
            assert response.result().status_code >= 400
            until(lambda: running.service.dispatcher.query(lambda scheduler: scheduler.running()) == 0)
            assert runtime.steps == before + 1

    def test_the_forecast_knows_the_cost_of_all_tiles(self, serve: Serve):
        runtime = simulated(costs={SIZE: SimulatedCost(step=0.05)}, max_batch=1, max_pixels=MAX_PIXELS)
        with serve(runtime) as running:
            tiles = len(runtime.info.tiles(HUGE))
            seconds = 4 * tiles * 0.05
            response = running.decode(make_latent(16, 5, 7), deadline_ms=int(500 * seconds))
            assert (response.status_code, response.json()["code"]) == (422, "deadline-too-short")
            assert running.decode(make_latent(16, 5, 7), deadline_ms=int(4000 * seconds)).status_code == 200


def test_a_swap_keeps_the_tiles(serve: Serve):
    source = Source(lambda number: Closing(number, max_pixels=MAX_PIXELS))
    with serve(source=source) as running:
        swap(running, source)
        assert size_of(running.decode(make_latent(16, 5, 7))) == HUGE
