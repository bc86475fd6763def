"""Decoder of all formats of images, for tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from engines.size import Size
from server.images.arrays import FLOAT16
from server.images.formats import OutputFormat


def decode(data: bytes, image_format: OutputFormat, size: Size) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of an encoded image."""
    if image_format == "raw":
        return np.frombuffer(data, np.uint8).reshape(*size, 3)
    if image_format == "npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    if image_format == "jxl":
        import imagecodecs

        return imagecodecs.jpegxl_decode(data)
    if image_format.startswith("planes"):
        planes = np.frombuffer(data, FLOAT16).reshape(3, *size).astype(np.float32)
        unit = planes / 2 + 0.5 if image_format == "planes-signed" else planes
        return (unit * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return np.asarray(Image.open(io.BytesIO(data)))
