"""Image formats that a response can have."""

from __future__ import annotations

from typing import Literal, get_args

ImageFormat = Literal["png", "webp", "jpeg"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)  # most preferred first
