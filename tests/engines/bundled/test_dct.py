"""The dct latent space: a projection of images, with channels of about unit variance."""

from __future__ import annotations

import pytest
import torch

from engines.bundled import dct
from engines.bundled.decoder import CONFIG, read_photo
from engines.errors import InputError
from engines.size import Size


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The bundled photo at low resolution, [1, 3, 128, 128]."""
    return dct.downscale(read_photo()[None])


def test_sizes_agree_with_the_decoder(photo: torch.Tensor) -> None:
    latent = dct.encode(photo)
    assert latent.shape == (1, CONFIG.latent_channels, *CONFIG.latent_size(Size(512, 512)))
    assert dct.decode(latent).shape == photo.shape


def test_encoding_inverts_decoding() -> None:
    latent = torch.randn(2, dct.CHANNELS, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(dct.encode(dct.decode(latent)), latent)


def test_decoding_after_encoding_is_a_projection_close_to_the_photo(photo: torch.Tensor) -> None:
    once = dct.decode(dct.encode(photo))
    torch.testing.assert_close(dct.decode(dct.encode(once)), once, atol=1e-5, rtol=0)
    assert (once - photo).square().mean() < 0.02 * photo.var()


@pytest.mark.parametrize(
    ("rgb", "ycbcr"),
    [((1, 1, 1), (1, 0, 0)), ((1, -1, -1), (-0.402, -0.337476, 1)), ((-1, -1, 1), (-0.772, 1, -0.162627))],
)
def test_a_flat_colour_is_its_luma_and_chroma_in_the_dc_coefficients(
    rgb: tuple[float, ...], ycbcr: tuple[float, ...]
) -> None:
    latent = dct.encode(torch.tensor(rgb, dtype=torch.float64)[None, :, None, None].expand(1, 3, 4, 4))[0, :, 0, 0]
    dc = [0, 10, 13]
    scaled = latent * torch.tensor(dct.SCALES, dtype=torch.float64)
    # The DC term of an orthonormal 4×4 transform is four times the mean.
    torch.testing.assert_close(scaled[dc], 4 * torch.tensor(ycbcr, dtype=torch.float64), atol=1e-4, rtol=0)
    others = [i for i in range(dct.CHANNELS) if i not in dc]
    assert latent[others].abs().max() < 1e-9


def test_a_cosine_lands_in_one_coefficient() -> None:
    cosine = torch.cos(torch.pi * (torch.arange(4, dtype=torch.float64) + 0.5) / 4)
    latent = dct.encode(cosine.expand(1, 3, 4, 4))[0, :, 0, 0]
    assert latent.abs().argmax() == 1
    assert latent.abs().topk(2).values[1] < 1e-9


def test_channels_of_a_photo_have_about_unit_variance(photo: torch.Tensor) -> None:
    spread = dct.encode(photo).square().mean(dim=(0, 2, 3)).sqrt()
    assert spread.min() > 0.3
    assert spread.max() < 3


@pytest.mark.parametrize("shape", [(1, 3, 6, 8), (1, 3, 8, 9), (1, 1, 8, 8), (3, 8, 8)])
def test_images_of_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        dct.encode(torch.zeros(shape))


def test_latents_of_other_shapes_are_rejected() -> None:
    with pytest.raises(InputError, match=r"\[B, 16, h, w\]"):
        dct.decode(torch.zeros(1, 15, 4, 4))
