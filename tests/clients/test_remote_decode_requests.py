"""Requests of other clients of `remote_decode`: SD.Next, kijai's ComfyUI node, and older versions with base64.

These clients are parts of large programs, so their requests are repeated here, with `requests`, which all of them use.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode

import numpy as np
import pytest
import requests
import torch

from tests.clients.latents import decode, pixels

pytestmark = pytest.mark.clients

SEED = 7
LATENT = torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(13)).bfloat16()
RAW = LATENT / 0.3611 + 0.1159
BINARY = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
SIDES = {"height": 64, "width": 96}


def data(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def post(url: str, **arguments: object) -> requests.Response:
    response = requests.post(f"{url}/remote-decode?seed={SEED}", timeout=60, **arguments)
    assert response.ok, response.json()
    return response


def tensor(content: bytes, shape: list[int], dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).reshape(shape)


def as_uint8(images: torch.Tensor) -> np.ndarray:
    """Return the first of images [B, 3, H, W] in [-1, 1] as [H, W, 3]."""
    return ((images[0].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def expected(flux: str) -> np.ndarray:
    return pixels(decode(flux, LATENT, seed=SEED))


class TestSdNext:
    """One request per latent; for FLUX without the batch axis, with the sides of the image and the factors."""

    def parameters(self, latent: torch.Tensor, **output: object) -> dict[str, object]:
        described = {"input_tensor_type": "binary", "shape": list(latent.shape), "dtype": "bfloat16"}
        return {**described, **output, **SIDES, "scaling_factor": 0.3611, "shift_factor": 0.1159}

    def test_png(self, flux: str, expected: np.ndarray):
        headers = {"Content-Type": "tensor/binary", "Accept": "image/png"}
        parameters = self.parameters(LATENT, image_format="png", output_type="pil")
        response = post(flux, params=parameters, headers=headers, data=data(LATENT))
        assert response.headers["Content-Type"] == "image/png"
        assert np.array_equal(pixels(response.content), expected)

    def test_tensor(self, flux: str, expected: np.ndarray):
        output = {"partial_postprocess": False, "output_type": "pt", "output_tensor_type": "binary"}
        response = post(flux, params=self.parameters(LATENT, **output), headers=BINARY, data=data(LATENT))
        images = tensor(response.content, json.loads(response.headers["shape"]), response.headers["dtype"])
        assert np.array_equal(as_uint8(images), expected)

    def test_packed(self, flux: str, expected: np.ndarray):
        packed = LATENT.reshape(16, 4, 2, 6, 2).permute(1, 3, 0, 2, 4).reshape(1, 24, 64)
        headers = {"Content-Type": "tensor/binary", "Accept": "image/png"}
        parameters = self.parameters(packed, image_format="png", output_type="pil")
        response = post(flux, params=parameters, headers=headers, data=data(packed))
        assert np.array_equal(pixels(response.content), expected)


def test_the_comfyui_node_gets_a_tensor_of_raw_latents(flux: str, expected: np.ndarray):
    raw = RAW[None].float()
    parameters = {"do_scaling": False, "output_type": "pt", "partial_postprocess": False}
    parameters |= {"shape": list(raw.shape), "dtype": "float32", **SIDES}
    response = post(flux, params=parameters, headers=BINARY, data=data(raw))
    images = tensor(response.content, json.loads(response.headers["shape"]), response.headers["dtype"])
    assert np.abs(as_uint8(images).astype(int) - expected).max() <= 1


class TestBase64:
    """The form of early versions: JSON with the elements in base64."""

    HEADERS = {"Content-Type": "tensor/base64", "Accept": "tensor/base64"}  # noqa: RUF012
    PARAMETERS = {"do_scaling": True, "output_type": "pt", "partial_postprocess": True}  # noqa: RUF012
    DESCRIPTION = {"shape": [1, *LATENT.shape], "dtype": "bfloat16"}  # noqa: RUF012

    def check(self, response: requests.Response, expected: np.ndarray) -> None:
        content = response.json()
        images = tensor(b64decode(content["inputs"]), content["parameters"]["shape"], content["parameters"]["dtype"])
        assert np.array_equal(images[0].numpy(), expected)

    def test_parameters_in_the_query(self, flux: str, expected: np.ndarray):
        body = {"inputs": b64encode(data(LATENT)).decode()}
        parameters = {**self.PARAMETERS, **self.DESCRIPTION}
        self.check(post(flux, params=parameters, headers=self.HEADERS, json=body), expected)

    def test_parameters_in_the_body(self, flux: str, expected: np.ndarray):
        body = {"inputs": b64encode(data(LATENT)).decode(), "parameters": {**self.PARAMETERS, **self.DESCRIPTION}}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self.check(post(flux, headers=headers, json=body), expected)
