"""WebP and JPEG encoders, based on Pillow; images are marked as sRGB. The PNG encoder is server/images/png.py."""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from server.images.formats import ImageFormat

MAX_SIDE: Final[dict[ImageFormat, int]] = {"png": 2**31 - 1, "webp": 16_383, "jpeg": 65_535}

_WEBP_METHOD = 0  # effort from 0 to 6; the lowest is fast and still compresses well
_LOSSLESS_EFFORT = 0  # the same, passed as `quality` of lossless WebP
_FULL_CHROMA = 90  # minimum JPEG quality without chroma subsampling

_ICC_DATE = slice(24, 36)  # ICC.1:2022, 7.2: creation time in the profile header, six 16-bit integers
_ICC_PLATFORM = slice(40, 44)  # 7.2.12: operating system of the profile's creator


def encode_webp(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode `pixels` [H, W, 3] uint8 as WebP with `quality` 0 to 100; 100 is lossless.

    Raises:
        ValueError: the array or the quality is invalid, or a side is longer than 16383 pixels.
    """
    image = _image(pixels, quality, "webp")
    lossless = quality == 100
    out = io.BytesIO()
    effort = _LOSSLESS_EFFORT if lossless else quality
    image.save(out, "WEBP", quality=effort, lossless=lossless, method=_WEBP_METHOD, icc_profile=_srgb_profile())
    return out.getvalue()


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode `pixels` [H, W, 3] uint8 as JPEG with `quality` 0 to 100; from 90 on without chroma subsampling.

    Raises:
        ValueError: the array or the quality is invalid, or a side is longer than 65535 pixels.
    """
    image = _image(pixels, quality, "jpeg")
    out = io.BytesIO()
    subsampling = "4:4:4" if quality >= _FULL_CHROMA else "4:2:0"
    # Pillow reads quality 0 as its default.
    image.save(out, "JPEG", quality=max(quality, 1), subsampling=subsampling, icc_profile=_srgb_profile())
    return out.getvalue()


def check_size(width: int, height: int, image_format: ImageFormat) -> None:
    """Raise ValueError if `image_format` does not support an image of this size."""
    limit = MAX_SIDE[image_format]
    if not (1 <= width <= limit and 1 <= height <= limit):
        raise ValueError(
            f"{image_format.upper()} supports 1 to {limit} pixels per side, not {width} x {height}; "
            "use PNG or a smaller image."
        )


def _image(pixels: NDArray[np.uint8], quality: int, image_format: ImageFormat) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 [height, width, 3], not {pixels.dtype} {pixels.shape}.")
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be 0 to 100, not {quality}.")
    height, width, _ = pixels.shape
    check_size(width, height, image_format)
    return Image.fromarray(pixels)


@cache
def _srgb_profile() -> bytes:
    """Return an ICC profile of sRGB; without one, some viewers assume another colour space.

    Its creation time and platform are constants, so that the same pixels give the same bytes in every process.
    """
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_ICC_DATE] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    profile[_ICC_PLATFORM] = bytes(4)
    return bytes(profile)
