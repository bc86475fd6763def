"""Both clients with a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from engines.errors import DecodeError
from engines.runtime.simulated import SimulatedCost
from pid_client import (
    AsyncPidClient,
    ConnectionLostError,
    DeadlineError,
    DecodeFailedError,
    Image,
    InvalidRequestError,
    Options,
    PidClient,
    PidError,
    UnauthorizedError,
)
from server.request import DecodeOptions
from tests.client.conftest import Connect
from tests.clients.latents import decode, pixels
from tests.server.conftest import SIZE, Running, make_latent, run_server, simulated
from tests.server.runtimes import ControlledRuntime, LateRowsRuntime, PoisonedRuntime
from tests.server.test_encoding import cancelled as images_cancelled
from tests.waiting import until

LATENT = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0)).half()
LATENTS = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1)).half()
UNREACHABLE = "http://127.0.0.1:9"
KEY = "alice-0123456789abcdef"


class TestDecode:
    @pytest.mark.parametrize("latent", [LATENT, LATENT[None], LATENT.bfloat16(), LATENT.numpy(), LATENT.tolist()])
    def test_the_image_is_that_of_the_latent(self, connect: Connect, flux: Running, latent: object):
        image = connect(flux.url).decode(latent, seed=7)
        assert (image.media_type, image.seed, image.index) == ("image/png", 7, 0)
        assert (
            np.abs(image.numpy().astype(int) - pixels(decode(flux.url, LATENT, seed=7))).max() <= 1
        )  # bfloat16 rounds

    def test_options_reach_the_server(self, connect: Connect, flux: Running):
        client = connect(flux.url)
        assert client.decode(LATENT, format="jpeg", quality=50).media_type == "image/jpeg"
        image = client.decode(LATENT, seed=7, sigma=0.25, steps=2, metadata=True, priority="interactive")
        assert {"Sigma": "0.25", "Steps": "2", "Seed": "7"}.items() <= image.pil().text.items()

    def test_a_prompt_and_its_embedding_reach_the_server(self, connect: Connect, flux: Running):
        client, prompt = connect(flux.url), "ein Fuchs, 狐, " + "sehr " * 1000
        caption = torch.full((2, 4), 2.0)
        shown = client.decode(LATENT, seed=1, caption=caption).numpy()[0, 0, 2]
        assert shown == pixels(decode(flux.url, LATENT, caption, seed=1))[0, 0, 2]
        expected = httpx.post(
            f"{flux.url}/decode",
            json={
                "latent": {
                    "data": b64encode(LATENT.numpy().tobytes()).decode(),
                    "shape": [16, 8, 8],
                    "dtype": "float16",
                },
                "prompt": prompt,
                "seed": 1,
            },
        )
        assert client.decode(LATENT, seed=1, prompt=prompt).data == expected.content

    @pytest.mark.parametrize("image_format", ["raw", "npy", "webp"])
    def test_pixels_of_all_formats(self, connect: Connect, flux: Running, image_format: str):
        client = connect(flux.url)
        image = client.decode(LATENT, seed=7, format=image_format, quality=100)
        expected = client.decode(LATENT, seed=7).numpy()
        assert np.array_equal(image.numpy(), expected)
        assert np.array_equal(np.asarray(image.pil().convert("RGB")), expected)

    def test_without_pillow_the_error_names_it(self, connect: Connect, flux: Running, monkeypatch: pytest.MonkeyPatch):
        client = connect(flux.url)
        png, raw = client.decode(LATENT, seed=7), client.decode(LATENT, seed=7, format="raw")
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(ImportError, match=r"install the package pillow, or request pixels with format='raw'"):
            png.numpy()
        assert raw.numpy().shape == (256, 256, 3)

    def test_an_image_is_saved(self, connect: Connect, flux: Running, tmp_path: Path):
        image = connect(flux.url).decode(LATENT)
        image.save(tmp_path / "image.png")
        assert (tmp_path / "image.png").read_bytes() == image.data

    def test_stages_have_durations(self, connect: Connect, flux: Running):
        assert {"queue", "denoise"} <= connect(flux.url).decode(LATENT).timings.keys()

    def test_a_batch_has_its_own_method(self, connect: Connect, flux: Running):
        with pytest.raises(ValueError, match="batch of 3 latents; use decode_batch"):
            connect(flux.url).decode(LATENTS)

    def test_a_request_id_is_kept(self, connect: Connect, flux: Running):
        image = connect(flux.url).decode(LATENT, request_id="mine")
        assert image.request_id == "mine"
        with pytest.raises(InvalidRequestError) as raised:
            connect(flux.url).decode(LATENT[:4], request_id="mine")
        assert raised.value.request_id == "mine"

    def test_the_deadline_reaches_the_server(self, connect: Connect):
        runtime = simulated(costs={SIZE: SimulatedCost(step=0.1)})
        with run_server(runtime) as server, pytest.raises(DeadlineError, match="deadline"):
            connect(server.url).decode(make_latent(), deadline=0.2)

    def test_the_deadline_may_exceed_the_limit_of_the_server(self, connect: Connect):
        with run_server(max_deadline=30.0) as server:
            assert connect(server.url, deadline=3600).decode(make_latent()).media_type == "image/png"


class TestBatch:
    def test_each_latent_has_its_image(self, connect: Connect, flux: Running):
        images = list(connect(flux.url).decode_batch(LATENTS, seed=5))
        assert [(image.index, image.seed) for image in images] == [(0, 5), (1, 6), (2, 7)]
        for image in images:
            assert np.array_equal(image.numpy(), pixels(decode(flux.url, LATENTS[image.index], seed=image.seed)))

    def test_each_latent_may_have_its_prompt(self, connect: Connect, flux: Running):
        client, prompts = connect(flux.url), ["one", "two", "three"]
        images = list(client.decode_batch(LATENTS, seed=5, prompt=prompts))
        singles = [client.decode(LATENTS[i], seed=5 + i, prompt=prompt) for i, prompt in enumerate(prompts)]
        assert [image.data for image in images] == [single.data for single in singles]

    @pytest.mark.parametrize("latents", [LATENT, LATENTS[:1]])
    def test_a_batch_may_have_one_latent(self, connect: Connect, flux: Running, latents: torch.Tensor):
        assert [type(image) for image in connect(flux.url).decode_batch(latents)] == [Image]

    def test_a_failed_image_is_yielded_as_its_error(self, connect: Connect):
        error = DecodeError("The decoder failed on this image.")
        runtime = PoisonedRuntime(error, {SIZE: SimulatedCost(step=0.01, batch_slope=0.1)}, max_batch=3, slots=3)
        latents = make_latent(3, 16, 2, 2)
        latents[1] = PoisonedRuntime.POISON
        with run_server(runtime) as server:
            first, second, third = connect(server.url).decode_batch(latents)
        assert isinstance(second, DecodeFailedError)
        assert (first.index, second.index, third.index) == (0, 1, 2)
        assert second.code == "decode-failed"

    def test_an_image_arrives_while_the_next_one_is_decoded(self, connect: Connect):
        runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)
        with run_server(runtime) as server:
            results = connect(server.url).decode_batch(make_latent(2, 16, 2, 2), steps=1)
            first = next(results)
            assert first.index == 0
            assert [image.index for image in results] == [1]


class TestStream:
    def test_chunks_are_the_image(self, connect: Connect, flux: Running):
        with connect(flux.url).stream(LATENT, seed=7) as stream:
            assert (stream.info.seed, stream.info.media_type) == (7, "image/png")
            data = b"".join(stream)
        assert np.array_equal(pixels(data), pixels(decode(flux.url, LATENT, seed=7)))

    def test_the_first_chunk_arrives_before_the_image_is_complete(self, connect: Connect):
        runtime = LateRowsRuntime({SIZE: SimulatedCost()})
        with run_server(runtime) as server:
            runtime.arrived.clear()
            with connect(server.url).stream(make_latent()) as stream:
                chunks = iter(stream)
                assert next(chunks).startswith(b"\x89PNG")
                runtime.arrived.set()
                assert b"IEND" in b"".join(chunks)

    def test_leaving_the_block_cancels_the_decode(self, connect: Connect):
        runtime = LateRowsRuntime({SIZE: SimulatedCost()})
        with run_server(runtime) as server:
            runtime.arrived.clear()
            with connect(server.url).stream(make_latent()):
                pass
            until(lambda: cancelled(server) == 1)
            runtime.arrived.set()

    def test_an_error_is_raised_before_the_block(self, connect: Connect, flux: Running):
        with pytest.raises(InvalidRequestError, match="4 channels"), connect(flux.url).stream(LATENT[:4]):
            pytest.fail("the block must not be entered")

    def test_a_file_has_the_image(self, connect: Connect, flux: Running, tmp_path: Path):
        path = tmp_path / "image.png"
        info = connect(flux.url).decode_to_file(LATENT, path, seed=7)
        assert info.seed == 7
        assert np.array_equal(pixels(path.read_bytes()), pixels(decode(flux.url, LATENT, seed=7)))
        assert [entry.name for entry in tmp_path.iterdir()] == ["image.png"]


class TestDecoders:
    def test_a_request_names_its_decoder(self, connect: Connect, flux_and_sd3: Running, tmp_path: Path):
        client, url = connect(flux_and_sd3.url), flux_and_sd3.url
        image = client.decode(LATENT, seed=7, decoder="SD3", metadata=True)
        assert image.data == decode(url, LATENT, seed=7, decoder="SD3", metadata=True)
        assert image.pil().text["Decoder"] == "sd3-simulated"
        results = list(client.decode_batch(LATENTS, seed=7, decoder="SD3", metadata=True))
        assert [result.pil().text["Decoder"] for result in results] == ["sd3-simulated"] * len(LATENTS)
        with client.stream(LATENT, seed=7, decoder="SD3", metadata=True) as stream:
            assert b"".join(stream) == image.data
        client.decode_to_file(LATENT, tmp_path / "image.png", seed=7, decoder="SD3", metadata=True)
        assert (tmp_path / "image.png").read_bytes() == image.data

    def test_without_a_name_the_error_lists_the_decoders(self, connect: Connect, flux_and_sd3: Running):
        with pytest.raises(InvalidRequestError, match="The decoders Flux and SD3 support this latent") as raised:
            connect(flux_and_sd3.url).decode(LATENT)
        assert (raised.value.status, raised.value.code) == (422, "ambiguous-decoder")

    def test_an_unknown_name_is_rejected(self, connect: Connect, flux_and_sd3: Running):
        with pytest.raises(InvalidRequestError, match="Unknown decoder 'sd3'") as raised:
            connect(flux_and_sd3.url).decode(LATENT, decoder="sd3")
        assert raised.value.code == "invalid-option"

    def test_info_has_the_decoders_by_name(self, connect: Connect, flux_and_sd3: Running):
        info = connect(flux_and_sd3.url).info()
        assert [(decoder.name, decoder.model) for decoder in info.decoders] == [
            ("Flux", "flux-simulated"),
            ("SD3", "sd3-simulated"),
        ]
        assert info.decoder("SD3") == info.decoders[1]
        with pytest.raises(ValueError, match="several decoders; name one of Flux, SD3"):
            info.decoder()
        with pytest.raises(ValueError, match="no decoder 'sdxl', only Flux, SD3"):
            info.decoder("sdxl")


class TestServer:
    def test_info_describes_the_decoder(self, connect: Connect, flux: Running):
        info = connect(flux.url).info().decoder()
        assert (info.name, info.model, info.upscale) == ("simulated", "flux-simulated", 4)
        assert info.latent_space._asdict() == {
            "name": "flux",
            "channels": 16,
            "pixels_per_cell": 8,
            "sigma_frame": "flow",
        }
        assert info.sizes[0] == ((256, 256), (8, 8))
        assert info.document["caption"]["tokens"] == 2

    def test_ready_is_that_of_the_server(self, connect: Connect):
        with run_server() as server:
            client = connect(server.url)
            assert client.ready() is True
            server.service.lifecycle.drain()
            assert client.ready() is False
        assert client.ready() is False

    def test_a_key_is_sent(self, connect: Connect, tmp_path: Path):
        (tmp_path / "keys").write_text(f"alice: {KEY}\n")
        with run_server(api_keys=tmp_path / "keys") as server:
            assert connect(server.url, KEY).decode(make_latent()).media_type == "image/png"
            with pytest.raises(UnauthorizedError, match="API key"):
                connect(server.url).decode(make_latent())

    def test_a_server_that_is_not_there_is_reported(self, connect: Connect):
        client = connect(UNREACHABLE, deadline=0.3)
        with pytest.raises(ConnectionLostError, match=r"connection to http://127\.0\.0\.1:9/decode failed"):
            client.decode(LATENT)
        assert client.ready() is False

    def test_an_error_does_not_show_the_password_of_the_url(self, connect: Connect):
        with pytest.raises(ConnectionLostError) as raised:
            connect("http://user:secret@127.0.0.1:9", retry=False).decode(LATENT)
        assert "secret" not in str(raised.value)

    @pytest.mark.parametrize("name", ["timeout", "base_url"])
    def test_an_argument_that_the_client_sets_is_rejected(self, connect: Connect, name: str):
        with pytest.raises(TypeError, match=f"argument {name} is not supported"):
            connect(UNREACHABLE, **{name: "5"})

    def test_headers_may_be_added(self, connect: Connect):
        sent: list[httpx.Request] = []

        def reply(request: httpx.Request) -> httpx.Response:
            sent.append(request)
            return httpx.Response(200)

        client = connect(
            UNREACHABLE, headers={"user-agent": "mine", "X-Team": "a"}, transport=httpx.MockTransport(reply)
        )
        assert client.ready()
        assert (sent[0].headers["User-Agent"], sent[0].headers["X-Team"]) == ("mine", "a")

    def test_a_path_before_the_endpoints_is_kept(self, connect: Connect):
        with pytest.raises(ConnectionLostError, match=r"http://127\.0\.0\.1:9/pid/decode failed"):
            connect(f"{UNREACHABLE}/pid", retry=False).decode(LATENT)

    @pytest.mark.parametrize(
        "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "", "http://u:p@host/?seed=1"]
    )
    def test_an_invalid_url_is_rejected_at_once(self, connect: Connect, url: str):
        with pytest.raises(ValueError, match="URL"):
            connect(url)

    @pytest.mark.parametrize("key", ["secret\n", "secrét", "secret ", ""])
    def test_an_invalid_key_is_rejected_at_once_and_not_shown(self, connect: Connect, key: str):
        with pytest.raises(ValueError, match="The API key is empty or contains") as raised:
            connect(UNREACHABLE, key)
        assert "secr" not in str(raised.value)

    @pytest.mark.parametrize("deadline", [0, -1])
    def test_an_invalid_deadline_is_rejected_at_once(self, connect: Connect, deadline: float):
        with pytest.raises(ValueError, match="positive"):
            connect(UNREACHABLE, deadline=deadline)

    def test_requests_share_a_connection(self, flux: Running):
        ports: list[int] = []

        def record(response: httpx.Response) -> None:
            ports.append(response.extensions["network_stream"].get_extra_info("client_addr")[1])

        with PidClient(flux.url, event_hooks={"response": [record]}) as client:
            client.decode(LATENT)
            list(client.decode_batch(LATENTS))
            client.decode(LATENT, on_preview=lambda preview: None)
            with pytest.raises(PidError):
                client.decode(LATENT[:4])
            client.info()
        assert len(ports) == 5
        assert len(set(ports)) == 1


def test_many_calls_of_one_client_run_at_once(flux: Running):
    async def decode_all() -> list[Image]:
        async with AsyncPidClient(flux.url) as client:
            return await asyncio.gather(*(client.decode(LATENT, seed=seed) for seed in range(40)))

    assert [image.seed for image in asyncio.run(decode_all())] == list(range(40))


def test_cancelling_a_task_cancels_the_decode():
    runtime = ControlledRuntime({SIZE: SimulatedCost()}, max_batch=1, slots=1)

    async def cancel(url: str) -> None:
        async with AsyncPidClient(url) as client:
            task = asyncio.create_task(client.decode(make_latent()))
            await asyncio.to_thread(runtime.entered.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with run_server(runtime) as server:
        runtime.pause()
        asyncio.run(cancel(server.url))
        runtime.resume()
        until(lambda: cancelled(server) == 1)


def test_options_are_those_of_the_server():
    own = {"caption", "deadline", "request_id"}  # in the body and in headers
    packing = {"height", "width"}  # `frames.unpack` replaces them
    others = {"deadline_ms", "preview"}  # `deadline` and `on_preview`
    assert Options.__annotations__.keys() - own == DecodeOptions.model_fields.keys() - packing - others


def test_importing_the_client_imports_neither_torch_nor_pillow():
    code = "import sys, pid_client; print({'torch', 'PIL', 'safetensors', 'diffusers', 'server'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def cancelled(server: Running) -> float:
    """Return the number of images that were cancelled because the client disconnected."""
    return sum(images_cancelled(server, "client-left").values())
