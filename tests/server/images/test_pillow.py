import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from server.images.pillow import check_size, encode_jpeg, encode_webp

RAMP = np.stack(np.broadcast_arrays(np.arange(64)[:, None] * 3, np.arange(80)[None] * 2, 90), -1).astype(np.uint8)


def read(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_webp_of_quality_100_is_lossless():
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(read(encode_webp(noise, 100))), noise)


@pytest.mark.parametrize(("encode", "name"), [(encode_webp, "webp"), (encode_jpeg, "jpeg")])
@pytest.mark.parametrize("quality", [0, 50, 89, 90, 99])
def test_lossy_images_stay_close_and_say_that_they_are_srgb(encode, name, quality):
    image = read(encode(RAMP, quality))
    assert Image.MIME[image.format] == f"image/{name}"
    difference = np.asarray(image).astype(int) - RAMP
    assert np.abs(difference).mean() < (30 if quality == 0 else 6)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize("encode", [encode_webp, encode_jpeg])
def test_higher_quality_costs_bytes(encode):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert len(encode(noise, 20)) < len(encode(noise, 95))


def test_sizes_a_format_cannot_hold_are_refused_by_name():
    with pytest.raises(ValueError, match="WEBP holds images of 1 to 16383"):
        encode_webp(np.zeros((1, 16_384, 3), np.uint8), 80)
    with pytest.raises(ValueError, match="JPEG holds images of 1 to 65535"):
        encode_jpeg(np.zeros((65_536, 1, 3), np.uint8), 80)
    check_size(16_384, 16_384, "png")


@pytest.mark.parametrize("encode", [encode_webp, encode_jpeg])
def test_other_arrays_and_qualities_are_refused(encode):
    with pytest.raises(ValueError, match="uint8"):
        encode(RAMP.astype(np.float32), 80)
    with pytest.raises(ValueError, match="uint8"):
        encode(RAMP[..., 0], 80)
    with pytest.raises(ValueError, match="quality is 0 to 100"):
        encode(RAMP, 101)
