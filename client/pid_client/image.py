"""Decoded images and their previews."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True, eq=False)
class ImageInfo:
    """Properties of an image that the server reports."""

    media_type: str
    seed: int  # of the decoder's noise
    timings: Mapping[str, float]  # seconds of each stage that had ended when the response began, such as `denoise`
    request_id: str  # id in the server's log
    index: int = 0  # of the latent in its batch
    shape: tuple[int, ...] | None = None  # [H, W, 3] of the formats raw and npy


@dataclass(frozen=True, eq=False)
class Image(ImageInfo):
    """An encoded image, or the uint8 pixels of the format `raw`."""

    data: bytes = b""

    def __repr__(self) -> str:
        return f"Image({self.media_type}, {len(self.data)} bytes, seed={self.seed}, index={self.index})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the data to a file. The name does not change the format; use the option `format`."""
        Path(path).write_bytes(self.data)

    def pil(self) -> PIL.Image.Image:
        """Return a Pillow image.

        Raises:
            ImportError: Pillow is not installed.
            PIL.UnidentifiedImageError: Pillow does not read this format, such as JPEG XL.
        """
        pillow = _pillow(self.media_type, ", or request pixels with format='raw' and use Image.numpy()")
        if self.shape is not None:
            return pillow.fromarray(self.numpy())
        return pillow.open(io.BytesIO(self.data))

    def numpy(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels [H, W, 3] uint8. The formats `raw` and `npy` do not need Pillow.

        Raises:
            ImportError, PIL.UnidentifiedImageError: as in `pil`.
        """
        if self.shape is None:
            return np.array(self.pil().convert("RGB"))
        if self.media_type == "application/x-npy":
            pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.load(io.BytesIO(self.data), allow_pickle=False)
            return pixels
        return np.frombuffer(self.data, np.uint8).reshape(self.shape).copy()  # writable


@dataclass(frozen=True, eq=False)
class Preview:
    """Small JPEG of the image that the decoder predicts after a step."""

    index: int  # of the latent in its batch
    step: int  # from 1
    steps: int  # of the decode
    latency: float  # seconds since the server accepted the request
    data: bytes = field(repr=False)  # JPEG, at most 512 pixels wide

    def pil(self) -> PIL.Image.Image:
        """Return a Pillow image.

        Raises:
            ImportError: Pillow is not installed.
        """
        return _pillow("previews").open(io.BytesIO(self.data))


def _pillow(contents: str, alternative: str = "") -> ModuleType:
    """Return the module `PIL.Image`, which is needed to read `contents`."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(f"Pillow is needed to read {contents}; install the package pillow{alternative}.") from error
    return PIL.Image
