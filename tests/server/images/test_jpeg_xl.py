"""JPEG XL: exact pixels, and errors for arrays that are not images."""

from __future__ import annotations

import numpy as np
import pytest

from server.images.jpeg_xl import encode_jxl

imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra jxl")


@pytest.mark.parametrize("shape", [(1, 1, 3), (33, 47, 3), (300, 520, 3)])
def test_every_pixel_is_exact(shape: tuple[int, ...]):
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(imagecodecs.jpegxl_decode(encode_jxl(noise)), noise)


def test_rows_need_not_be_contiguous_or_writeable():
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    noise.flags.writeable = False
    assert np.array_equal(imagecodecs.jpegxl_decode(encode_jxl(noise[:, ::2])), noise[:, ::2])


def test_the_same_pixels_give_the_same_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert encode_jxl(noise) == encode_jxl(noise.copy())


def test_unsupported_arrays_are_rejected():
    with pytest.raises(ValueError, match="uint8"):
        encode_jxl(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        encode_jxl(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="supports 1 to 262144 pixels"):
        encode_jxl(np.zeros((1, 262_145, 3), np.uint8))
