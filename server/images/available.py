"""Formats that this process can encode; some need optional packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

from engines.size import Size
from server.errors import InvalidOptionError
from server.images import jpeg_xl, pillow
from server.images.checks import check_size
from server.images.formats import IMAGE_FORMATS, ImageFormat, OutputFormat

# By format: whether it is available, and what it needs.
_OPTIONAL: Final[Mapping[OutputFormat, tuple[Callable[[], bool], str]]] = {
    "avif": (pillow.has_avif, "the package pillow with libavif: pip install --upgrade pillow"),
    "jxl": (jpeg_xl.is_installed, "the package imagecodecs: pip install 'pid-decode-server[jxl]'"),
}


@cache
def available_formats() -> tuple[ImageFormat, ...]:
    """Return the values of the option `format` that this process supports, most preferred first.

    The first call looks for the optional packages.
    """
    return tuple(name for name in IMAGE_FORMATS if name not in _OPTIONAL or _OPTIONAL[name][0]())


def check_available(image_format: OutputFormat) -> None:
    """Check that this process can encode images as `image_format`.

    Raises:
        InvalidOptionError: an optional package is missing; the message names it.
    """
    if image_format in _OPTIONAL and image_format not in available_formats():
        _, need = _OPTIONAL[image_format]
        raise InvalidOptionError(f"The format {image_format} is not available, because this server needs {need}.")


def check_format(image_format: OutputFormat, size: Size) -> None:
    """Check that this process can encode an image of `size` as `image_format`.

    Raises:
        InvalidOptionError: an optional package is missing, or the format does not support images of this size.
    """
    check_available(image_format)
    try:
        check_size(size.width, size.height, image_format)
    except ValueError as error:
        raise InvalidOptionError(str(error)) from None
