"""Image and latent sizes."""

from __future__ import annotations

import argparse
from typing import NamedTuple

MAX_SIZES = 64  # output sizes of a bundle
MAX_SIDE = 16384  # side of an image in pixels, four times the longest one that a released decoder is intended for


class Size(NamedTuple):
    """Height and width of an image in pixels, or of a latent in cells. `str()` returns HEIGHTxWIDTH, e.g. 2304x1728."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Parse `HEIGHTxWIDTH`, or a single number for a square.

        Raises:
            ValueError: `text` is not a size; the message can be shown to users.
        """
        height, cross, width = text.strip().lower().partition("x")
        width = width if cross else height
        if not all(side.isascii() and side.isdigit() and len(side) < 10 for side in (height, width)):
            raise ValueError(f"{text[:40]!r} is not a size; use HEIGHTxWIDTH, e.g. 2048x2048")
        return cls(int(height), int(width))

    @property
    def area(self) -> int:
        """Number of pixels, or cells."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def size_argument(text: str) -> Size:
    """Parse a size as the `type` of an argparse argument."""
    try:
        return Size.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
