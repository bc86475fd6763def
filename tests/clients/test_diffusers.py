"""`remote_decode` of diffusers, in all combinations of diffusers' own tests.

The pixels of each response are compared with the PNG that `POST /decode` returns for the normalised latent. The decoder
is simulated: its images show the latent and the seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode
from PIL import Image

from tests.clients.latents import decode, pixels

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning")]

SEED = 7
HEIGHT, WIDTH = 64, 96  # of the latent's image; the decoder returns an image four times as large


@dataclass(frozen=True)
class Space:
    """A latent space: raw latent z = normalised latent / scale + shift."""

    url: str
    channels: int
    scale: float
    shift: float | None
    dtype: torch.dtype
    packed: bool = False

    @property
    def endpoint(self) -> str:
        """Address for diffusers; its caller can set options of the server only in the query."""
        return f"{self.url}/remote-decode?seed={SEED}"

    def latents(self, batch: int = 1) -> torch.Tensor:
        """Return normalised latents [B, c, h, w]."""
        shape = (batch, self.channels, HEIGHT // 8, WIDTH // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(13)).to(self.dtype)

    def raw(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents of the autoencoder, rounded to the dtype, as diffusers' tests compute them."""
        return latents / self.scale + (self.shift or 0)

    def normalised(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the float32 latents that the decoder needs, from those of the autoencoder."""
        return (raw.float() - (self.shift or 0)) * self.scale

    def sent(self, latents: torch.Tensor) -> dict[str, object]:
        """Return the arguments of `remote_decode` with these latents, packed if the pipeline packs them."""
        if not self.packed:
            return {"tensor": latents}
        batch, channels, height, width = latents.shape
        cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return {"tensor": cells.reshape(batch, -1, 4 * channels), "height": HEIGHT, "width": WIDTH}

    def factors(self) -> dict[str, float | None]:
        return {"scaling_factor": self.scale, "shift_factor": self.shift}

    def expected(self, latents: torch.Tensor) -> list[np.ndarray]:
        """Return the images [H, W, 3] uint8 of normalised latents."""
        return [pixels(decode(self.url, latent, seed=SEED + i)) for i, latent in enumerate(latents.float())]


@pytest.fixture(scope="module", params=["flux", "flux packed", "flux float32", "sdxl"])
def space(request: pytest.FixtureRequest) -> Space:
    """The latent spaces and layouts of diffusers' tests that this server decodes."""
    name, _, variant = request.param.partition(" ")
    url = request.getfixturevalue(name)
    if name == "sdxl":
        return Space(url, 4, 0.13025, None, torch.float16)
    dtype = torch.float32 if variant == "float32" else torch.bfloat16
    return Space(url, 16, 0.3611, 0.1159, dtype, packed=variant == "packed")


def call(space: Space, latents: torch.Tensor, **arguments: object) -> object:
    return remote_decode(space.endpoint, **space.sent(latents), **{**space.factors(), **arguments})


def as_array(output: object) -> np.ndarray:
    assert isinstance(output, Image.Image)
    return np.asarray(output)


def largest_difference(image: np.ndarray, expected: np.ndarray) -> int:
    """Return the largest difference of two images in 1/255."""
    assert image.shape == expected.shape
    return int(np.abs(image.astype(int) - expected.astype(int)).max())


def test_images_show_the_latent(space: Space):
    """Otherwise the comparisons in this module prove nothing."""
    latents = space.latents(2)
    first, second = space.expected(latents)
    assert first.shape == (4 * HEIGHT, 4 * WIDTH, 3)
    assert largest_difference(first, second) > 100
    assert largest_difference(first, space.expected(space.normalised(latents))[0]) > 10


IMAGE_ARGUMENTS: dict[str, dict[str, object]] = {
    "pil": {"output_type": "pil", "image_format": "png"},
    "pil with a processor": {"output_type": "pil", "processor": VaeImageProcessor()},
    "pt with a processor": {"output_type": "pt", "processor": VaeImageProcessor()},
    "pt with partial_postprocess": {"output_type": "pt", "partial_postprocess": True},
}


@pytest.mark.parametrize("arguments", IMAGE_ARGUMENTS.values(), ids=IMAGE_ARGUMENTS)
def test_the_image_has_the_pixels_of_decode(space: Space, arguments: dict[str, object]):
    latents = space.latents()
    output = call(space, latents, **arguments)
    (image,) = output if isinstance(output, list) else [output]
    assert np.array_equal(as_array(image), space.expected(latents)[0])


def test_jpeg_is_the_default_format(space: Space):
    output = call(space, space.latents())
    assert isinstance(output, Image.Image)
    assert output.format == "jpeg"
    difference = as_array(output).astype(int) - space.expected(space.latents())[0]
    assert np.abs(difference).mean() < 2


def test_png_is_detected(space: Space):
    output = call(space, space.latents(), image_format="png")
    assert isinstance(output, Image.Image)
    assert output.format == "png"


def test_a_tensor_without_postprocessing_is_in_minus_1_to_1(space: Space):
    output = call(space, space.latents(), output_type="pt", return_type="pt")
    assert isinstance(output, torch.Tensor)
    assert output.dtype == torch.float16
    expected = torch.from_numpy(space.expected(space.latents())[0].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=1e-3)


def test_a_tensor_with_partial_postprocessing_is_the_uint8_image(space: Space):
    output = call(space, space.latents(), output_type="pt", return_type="pt", partial_postprocess=True)
    assert isinstance(output, torch.Tensor)
    assert output.dtype == torch.uint8
    assert np.array_equal(output.numpy()[0], space.expected(space.latents())[0])


def test_a_batch_returns_one_image_per_latent(space: Space):
    latents = space.latents(3)
    images = call(space, latents, output_type="pt", partial_postprocess=True)
    assert isinstance(images, list)
    for image, expected in zip(images, space.expected(latents), strict=True):
        assert np.array_equal(as_array(image), expected)
    tensor = call(space, latents, output_type="pt", return_type="pt")
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == (3, 3, 4 * HEIGHT, 4 * WIDTH)


@pytest.mark.parametrize("do_scaling", [False, None])
def test_without_scaling_raw_latents_are_normalised(space: Space, do_scaling: bool | None):
    raw = space.raw(space.latents())
    nothing = {"scaling_factor": None, "shift_factor": None}
    arguments = {"do_scaling": do_scaling, "output_type": "pt", "partial_postprocess": True, **nothing}
    image = as_array(call(space, raw, **arguments))
    (expected,) = space.expected(space.normalised(raw))
    assert largest_difference(image, expected) <= 1  # rounding of the normalisation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling_factor": None, "shift_factor": None}, "`do_scaling` is deprecated"),
        ({"input_tensor_type": "base64"}, "input_tensor_type='base64' is deprecated"),
        ({"output_tensor_type": "base64"}, "output_tensor_type='base64' is deprecated"),
    ],
)
def test_deprecated_arguments_give_the_same_image(space: Space, arguments: dict[str, object], message: str):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = call(space, space.latents(), output_type="pt", partial_postprocess=True, **arguments)
    assert any(str(warning.message).startswith(message) for warning in caught)
    assert np.array_equal(as_array(image), space.expected(space.latents())[0])


class TestErrors:
    """Errors reach the caller as a RuntimeError with the problem document."""

    def problem(self, decode: Callable[[], object]) -> dict[str, object]:
        with pytest.raises(RuntimeError) as raised:
            decode()
        (problem,) = raised.value.args
        assert isinstance(problem, dict)
        return problem

    @pytest.mark.parametrize("factors", [(0.13025, None), (1.5305, 0.0609), (0.3611, 0.0609)])
    def test_factors_of_another_latent_space_are_rejected(self, flux: str, factors: tuple[float, float | None]):
        latents = torch.zeros(1, 16, 8, 12)
        scale, shift = factors
        problem = self.problem(
            lambda: remote_decode(f"{flux}/remote-decode", latents, scaling_factor=scale, shift_factor=shift)
        )
        assert problem["status"] == 422
        assert "flux" in str(problem["detail"])

    def test_a_latent_of_another_shape_is_rejected(self, flux: str):
        problem = self.problem(
            lambda: remote_decode(f"{flux}/remote-decode", torch.zeros(1, 4, 8, 12), scaling_factor=0.3611)
        )
        assert (problem["status"], problem["code"]) == (422, "invalid-latent")

    def test_an_unknown_option_in_the_query_of_the_endpoint_is_rejected(self, flux: str):
        url = f"{flux}/remote-decode?sead=7"
        problem = self.problem(lambda: remote_decode(url, torch.zeros(1, 16, 8, 12), scaling_factor=0.3611))
        assert (problem["status"], problem["code"]) == (422, "invalid-option")

    def test_video_is_rejected(self, flux: str):
        arguments = {"output_type": "mp4", "return_type": "mp4", "scaling_factor": 0.3611}
        problem = self.problem(lambda: remote_decode(f"{flux}/remote-decode", torch.zeros(1, 16, 8, 12), **arguments))
        assert problem["status"] in (406, 422)
