"""WebP, JPEG and AVIF: what is encoded can be read back, and unsupported arguments are rejected."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from server.images.pillow import encode_avif, encode_jpeg, encode_webp, has_avif

avif = pytest.param(encode_avif, marks=pytest.mark.skipif(not has_avif(), reason="Pillow without libavif"))
ENCODERS = [encode_webp, encode_jpeg, avif]

RAMP = np.stack(np.broadcast_arrays(np.arange(64)[:, None] * 3, np.arange(80)[None] * 2, 90), -1).astype(np.uint8)


def read(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_webp_with_quality_100_is_lossless():
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(read(encode_webp(noise, 100))), noise)


@pytest.mark.parametrize(("encode", "name"), [(encode_webp, "webp"), (encode_jpeg, "jpeg")])
@pytest.mark.parametrize("quality", [0, 50, 89, 90, 99])
def test_lossy_images_are_close_and_marked_as_srgb(encode, name, quality):
    image = read(encode(RAMP, quality))
    assert Image.MIME[image.format] == f"image/{name}"
    difference = np.asarray(image).astype(int) - RAMP
    assert np.abs(difference).mean() < (30 if quality == 0 else 6)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize("encode", [encode_webp, encode_jpeg])
def test_the_colour_profile_depends_on_neither_the_time_nor_the_platform(encode):
    profile = read(encode(RAMP, 90)).info["icc_profile"]
    assert profile[24:36] == bytes.fromhex("07d0 0001 0001 0000 0000 0000")  # 1 January 2000
    assert profile[40:44] == bytes(4)
    assert profile[84:100] == bytes(16)  # the profile ID, a hash that is not computed


@pytest.mark.parametrize("encode", ENCODERS)
def test_another_process_encodes_the_same_bytes(encode):
    program = f"""
import hashlib, numpy
from server.images.pillow import {encode.__name__} as encode
ramp = numpy.stack(numpy.broadcast_arrays(numpy.arange(64)[:, None] * 3, numpy.arange(80)[None] * 2, 90), -1)
print(hashlib.sha256(encode(ramp.astype(numpy.uint8), 90)).hexdigest())
"""
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(encode(RAMP, 90)).hexdigest()


@pytest.mark.parametrize("encode", ENCODERS)
def test_higher_quality_needs_more_bytes(encode):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert len(encode(noise, 20)) < len(encode(noise, 95))


@pytest.mark.parametrize(("encode", "limit"), [(encode_webp, 16_383), (encode_jpeg, 65_535), (encode_avif, 32_768)])
def test_a_size_that_a_format_does_not_support_is_rejected(encode, limit: int):
    for shape in ((1, limit + 1, 3), (limit + 1, 1, 3), (0, 1, 3)):
        with pytest.raises(ValueError, match=f"supports 1 to {limit} pixels"):
            encode(np.zeros(shape, np.uint8), 80)


@pytest.mark.parametrize(
    ("encode", "limit"), [(encode_webp, 16_383), pytest.param(*avif.values, 32_768, marks=avif.marks)]
)
def test_the_largest_size_can_be_read(encode, limit: int):
    assert read(encode(np.zeros((1, limit, 3), np.uint8), 80)).size == (limit, 1)


@pytest.mark.parametrize("quality", [1, 50, 89, 90, 100])
@pytest.mark.parametrize("encode", [avif])
def test_avif_is_close_and_marked_as_srgb(encode, quality: int):
    data = encode(RAMP, quality)
    assert b"colrnclx" + struct.pack(">HHHB", 1, 13, 6, 0x80) in data  # primaries, transfer, matrix, full range
    image = read(data)
    assert image.format == "AVIF"
    assert np.abs(np.asarray(image).astype(int) - RAMP).mean() < (30 if quality == 1 else 6)


@pytest.mark.parametrize("encode", [encode_jpeg, avif])
def test_colours_are_not_subsampled_from_quality_90_on(encode):
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255  # red and blue columns
    errors = [np.abs(np.asarray(read(encode(stripes, quality))).astype(int) - stripes).mean() for quality in (89, 90)]
    assert errors[0] > 4 * errors[1]


@pytest.mark.parametrize("encode", ENCODERS)
def test_unsupported_arrays_and_qualities_are_rejected(encode):
    with pytest.raises(ValueError, match="uint8"):
        encode(RAMP.astype(np.float32), 80)
    with pytest.raises(ValueError, match="uint8"):
        encode(RAMP[..., 0], 80)
    with pytest.raises(ValueError, match="quality must be 0 to 100"):
        encode(RAMP, 101)
