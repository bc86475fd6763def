"""diffusers' remote_decode: parameters, raw latents and responses. The package itself is tested in tests/clients."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from engines.pid.released import LATENT_SPACES
from engines.runtime.simulated import SimulatedCost
from tests.server.conftest import IMAGE, SIZE, Running, make_latent, run_server
from tests.server.runtimes import RecordingRuntime

LATENT = make_latent(1, 16, 2, 2)
BINARY, BASE64 = "tensor/binary", "tensor/base64"


@contextlib.contextmanager
def serve_space(name: str, **changes: object) -> Iterator[tuple[Running, RecordingRuntime]]:
    runtime = RecordingRuntime(name, {SIZE: SimulatedCost()}, {SIZE: IMAGE}, **changes)
    with run_server(runtime, max_images=3) as running:
        runtime.samples.clear()  # those of the warm-up
        yield running, runtime


@pytest.fixture(scope="module")
def flux() -> Iterator[tuple[Running, RecordingRuntime]]:
    with serve_space("flux") as pair:
        yield pair


def post(running: Running, latent: torch.Tensor = LATENT, accept: str | None = BINARY, **params: object):
    """Send a request as diffusers does; a parameter of None is left out."""
    dtype = str(latent.dtype).removeprefix("torch.")
    defaults = {"shape": list(latent.shape), "dtype": dtype, "output_type": "pt", "scaling_factor": 0.3611}
    values = {name: value for name, value in {**defaults, **params}.items() if value is not None}
    content = latent.contiguous().view(torch.uint8).numpy().tobytes()
    headers = {"Content-Type": BINARY} | ({} if accept is None else {"Accept": accept})
    return running.client.post("/remote-decode", content=content, params=values, headers=headers)


def tensor(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == BINARY
    assert int(response.headers["content-length"]) == len(response.content)
    return np.frombuffer(response.content, response.headers["dtype"]).reshape(json.loads(response.headers["shape"]))


def rejected(response: httpx.Response, status: int, code: str) -> str:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    return response.json()["detail"]


class TestResponses:
    def test_pt_is_float16_from_minus_1_to_1_in_planes(self, flux):
        values = tensor(post(flux[0]))
        assert (values.dtype, values.shape) == (np.float16, (1, 3, *SIZE))
        pixels = ((values[0].astype(np.float32) / 2 + 0.5) * 255).round().transpose(1, 2, 0)
        assert (pixels == IMAGE).all()

    def test_pt_with_partial_postprocess_is_uint8(self, flux):
        values = tensor(post(flux[0], partial_postprocess="True"))
        assert (values.dtype, values.shape) == (np.uint8, (1, *SIZE, 3))
        assert (values[0] == IMAGE).all()

    def test_pil_as_a_tensor_is_float16_from_0_to_1(self, flux):
        values = tensor(post(flux[0], output_type="pil"))
        assert ((values[0].astype(np.float32) * 255).round().transpose(1, 2, 0) == IMAGE).all()

    @pytest.mark.parametrize(
        ("accept", "params", "kind"),
        [
            ("image/png", {}, "PNG"),
            ("image/jpeg", {}, "JPEG"),
            ("*/*", {"image_format": "png"}, "PNG"),
            (None, {"image_format": "jpg"}, "JPEG"),
            (None, {"format": "webp"}, "WEBP"),
        ],
    )
    def test_pil_is_an_image(self, flux, accept: str | None, params: dict[str, str], kind: str):
        response = post(flux[0], accept=accept, output_type="pil", **params)
        image = Image.open(io.BytesIO(response.content))
        assert (response.headers["content-type"], image.format) == (f"image/{kind.lower()}", kind)
        if kind == "PNG":
            assert (np.asarray(image) == IMAGE).all()

    def test_a_batch_is_one_tensor_and_its_seeds_are_in_a_header(self, flux):
        response = post(flux[0], make_latent(3, 16, 2, 2), partial_postprocess="True", seed=5)
        assert (tensor(response) == IMAGE).all()
        assert tensor(response).shape[0] == 3
        assert response.headers["x-seed"] == "5, 6, 7"
        detail = rejected(
            post(flux[0], make_latent(3, 16, 2, 2), "image/png", output_type="pil"), 422, "invalid-option"
        )
        assert "output_type=pt" in detail

    @pytest.mark.parametrize(
        ("accept", "options"),
        [(BASE64, {}), ("application/json", {}), (None, {"output_tensor_type": "base64"})],
    )
    def test_a_tensor_in_base64(self, flux, accept: str | None, options: dict[str, str]):
        response = post(flux[0], accept=accept, partial_postprocess="True", **options)
        content = response.json()
        assert content["parameters"] == {"shape": [1, *SIZE, 3], "dtype": "uint8"}
        assert base64.b64decode(content["inputs"]) == IMAGE.tobytes()

    def test_an_accept_header_without_a_supported_type_is_rejected(self, flux):
        rejected(post(flux[0], accept="image/gif", output_type="pil"), 406, "not-acceptable")


class TestRequests:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes(self, flux, dtype: torch.dtype):
        running, runtime = flux
        assert post(running, LATENT.to(dtype)).status_code == 200
        assert torch.equal(runtime.samples[-1].latent, LATENT.to(dtype).float()[0])

    def test_options_are_in_the_query_of_the_endpoint(self, flux):
        running, runtime = flux
        post(running, seed=7, sigma=0.25)
        assert (runtime.samples[-1].seed, runtime.samples[-1].sigma) == (7, 0.25)

    @pytest.mark.parametrize("shape", [(1, 1, 64), (1, 64)])
    def test_packed_latents(self, flux, shape: tuple[int, ...]):
        running, runtime = flux
        tokens = LATENT.view(1, 16, 1, 2, 1, 2).permute(0, 2, 4, 1, 3, 5).reshape(shape)
        assert post(running, tokens, height=16, width=16).status_code == 200
        assert torch.equal(runtime.samples[-1].latent, LATENT[0])

    def test_the_height_and_width_of_a_latent_that_is_not_packed_must_be_right(self, flux):
        assert post(flux[0], height=16, width=16).status_code == 200
        assert rejected(post(flux[0], height=16, width=32), 422, "invalid-option")

    @pytest.mark.parametrize("media_type", [BASE64, "application/json"])
    @pytest.mark.parametrize("in_query", [True, False])
    def test_a_body_in_base64(self, flux, media_type: str, in_query: bool):
        parameters = {"shape": [1, 16, 2, 2], "dtype": "float32", "do_scaling": True}
        parameters |= {"output_type": "pt", "partial_postprocess": True}
        body = {"inputs": base64.b64encode(LATENT.numpy().tobytes()).decode()}
        response = flux[0].client.post(
            "/remote-decode",
            json=body if in_query else {**body, "parameters": parameters},
            params=parameters if in_query else {},
            headers={"Content-Type": media_type, "Accept": BASE64},
        )
        assert base64.b64decode(response.json()["inputs"]) == IMAGE.tobytes()

    @pytest.mark.parametrize(
        "body", ["[]", "{}", '{"inputs": 1}', '{"inputs": "", "x": 1}', '{"inputs": "", "parameters": 1}']
    )
    def test_other_json_is_rejected(self, flux, body: str):
        headers = {"Content-Type": "application/json"}
        rejected(flux[0].client.post("/remote-decode", content=body, headers=headers), 400, "malformed-body")

    @pytest.mark.parametrize(
        ("params", "part"),
        [
            ({"shape": None}, "parameter shape"),
            ({"dtype": None}, "parameter dtype"),
            ({"shape": "1,x"}, "integers of the tensor's shape"),
            ({"shape": ["1", "16", "2", "x"]}, "integers of the tensor's shape"),
            ({"output_type": "mp4"}, "decodes no videos"),
            ({"image_format": "gif"}, "png or jpg"),
            ({"partial_postprocess": "maybe"}, "true or false"),
            ({"scaling_factor": "nan"}, "a finite number"),
            ({"sede": 3}, "did you mean seed"),
        ],
    )
    def test_an_invalid_parameter_is_rejected(self, flux, params: dict[str, object], part: str):
        assert part in rejected(post(flux[0], **params), 422, "invalid-option")

    def test_an_invalid_tensor_is_rejected(self, flux):
        assert "int8" in rejected(post(flux[0], dtype="int8"), 422, "invalid-latent")
        assert "channels" in rejected(post(flux[0], make_latent(1, 4, 2, 2)), 422, "invalid-latent")
        rejected(post(flux[0], shape=[2, 16, 2, 2]), 400, "malformed-body")
        response = flux[0].client.post("/remote-decode", content=b"x", headers={"Content-Type": "text/plain"})
        assert BINARY in rejected(response, 415, "unsupported-media-type")


class TestNormalisation:
    @pytest.mark.parametrize("do_scaling", [None, "False"])
    @pytest.mark.parametrize(("name", "channels"), [("flux", 16), ("sd3", 16), ("sdxl", 4), ("qwenimage", 16)])
    def test_raw_latents_are_normalised_for_the_latent_space(self, name: str, channels: int, do_scaling: str | None):
        raw = make_latent(2, channels, 2, 2)
        with serve_space(name, latent_channels=channels) as (running, runtime):
            assert post(running, raw, scaling_factor=None, do_scaling=do_scaling).status_code == 200
        statistics = LATENT_SPACES[name].statistics
        received = torch.stack([sample.latent for sample in runtime.samples])
        shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (statistics.shift, statistics.scale))
        assert torch.allclose(received / scale + shift, raw, atol=1e-5)
        assert not torch.allclose(received, raw, atol=0.01)

    @pytest.mark.parametrize("params", [{"do_scaling": "True", "scaling_factor": None}, {"shift_factor": 0.1159}, {}])
    def test_normalised_latents_are_not_changed(self, flux, params: dict[str, object]):
        running, runtime = flux
        assert post(running, **params).status_code == 200
        assert torch.equal(runtime.samples[-1].latent, LATENT[0])

    @pytest.mark.parametrize(
        "params", [{"scaling_factor": 0.13025}, {"scaling_factor": 1.5305}, {"shift_factor": 0.0609}]
    )
    def test_factors_of_another_latent_space_are_rejected(self, flux, params: dict[str, float]):
        assert "this decoder is for flux" in rejected(post(flux[0], **params), 422, "invalid-option")

    def test_a_latent_space_with_statistics_per_channel_has_no_factor(self):
        with serve_space("qwenimage") as (running, _):
            assert "has no scaling_factor" in rejected(post(running), 422, "invalid-option")

    def test_raw_latents_are_rejected_if_only_the_autoencoder_can_normalise_them(self):
        with serve_space("flux2") as (running, _):
            assert "do_scaling=true" in rejected(post(running, scaling_factor=None), 422, "invalid-latent")
            assert post(running, scaling_factor=None, do_scaling="True").status_code == 200


def test_requests_are_counted_by_protocol(flux):
    post(flux[0])
    series = 'pid_requests_total{code="200",decoder="simulated",protocol="remote-decode"}'
    assert f"{series} 0.0" not in flux[0].client.get("/metrics").text
