"""WebP, JPEG and AVIF encoders, based on Pillow; images are marked as sRGB. The PNG encoder is server/images/png.py."""

from __future__ import annotations

import io
import struct
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from server.images.checks import check_pixels
from server.images.formats import ImageFormat

_WEBP_METHOD = 0  # effort from 0 to 6; the lowest is fast and still compresses well
_LOSSLESS_EFFORT = 0  # the same, passed as `quality` of lossless WebP
_FULL_CHROMA = 90  # minimum quality of JPEG and AVIF without chroma subsampling
_AVIF_SPEED = 10  # from 0 to 10; 8 needs a third more time for the same size, 6 eight times as much

_ICC_DATE = slice(24, 36)  # ICC.1:2022, 7.2: creation time in the profile header, six 16-bit integers
_ICC_PLATFORM = slice(40, 44)  # 7.2.12: operating system of the profile's creator


def has_avif() -> bool:
    """Return whether Pillow was built with libavif, which AVIF needs."""
    return bool(features.check("avif"))


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
    # Pillow reads quality 0 as its default.
    image.save(out, "JPEG", quality=max(quality, 1), subsampling=_subsampling(quality), icc_profile=_srgb_profile())
    return out.getvalue()


def encode_avif(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode `pixels` [H, W, 3] uint8 as AVIF with `quality` 0 to 100; from 90 on without chroma subsampling.

    Images are marked as sRGB by code points (CICP), which need no profile.

    Raises:
        ValueError: the array or the quality is invalid, or a side is longer than 32768 pixels.
    """
    image = _image(pixels, quality, "avif")
    out = io.BytesIO()
    subsampling = _subsampling(quality)
    image.save(out, "AVIF", quality=quality, subsampling=subsampling, speed=_AVIF_SPEED, max_threads=1)
    return out.getvalue()


def _image(pixels: NDArray[np.uint8], quality: int, image_format: ImageFormat) -> Image.Image:
    check_pixels(pixels, image_format)
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be 0 to 100, not {quality}.")
    return Image.fromarray(pixels)


def _subsampling(quality: int) -> str:
    return "4:4:4" if quality >= _FULL_CHROMA else "4:2:0"


@cache
def _srgb_profile() -> bytes:
    """Return an ICC profile of sRGB; without one, some viewers assume another colour space.

    Its creation time and platform are constants, so that the same pixels give the same bytes in every process.
    """
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_ICC_DATE] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    profile[_ICC_PLATFORM] = bytes(4)
    return bytes(profile)
