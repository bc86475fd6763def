"""Content negotiation: the image format and the container of a response, by the Accept header (RFC 9110)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args
from urllib.request import parse_http_list

from server.body.media import JSON, PROBLEM, header_value
from server.body.quoting import one_of
from server.errors import NotAcceptableError
from server.images.available import available_formats
from server.images.formats import ALIASES, IMAGE_FORMATS, MEDIA_TYPES, ImageFormat

MULTIPART = "multipart/mixed"
ZIP = "application/zip"
HTML = "text/html"
EVENTS = "text/event-stream"
REPLACE = "multipart/x-mixed-replace"

# The arrangement of a response's images, most preferred first; `none` is one image as the body. The last two have
# previews.
Container = Literal["none", "multipart", "json", "zip", "events", "replace"]
CONTAINER_TYPES: Mapping[Container, str] = {
    "multipart": MULTIPART,
    "json": JSON,
    "zip": ZIP,
    "events": EVENTS,
    "replace": REPLACE,
}
WITH_PREVIEWS: Sequence[Container] = ("events", "replace")

_ALIASES = {f"image/{alias}": MEDIA_TYPES[name] for alias, name in ALIASES.items()}
_MAX_ACCEPT = 1024  # characters of an Accept header that are read


class Representation(NamedTuple):
    """What the response to a request consists of."""

    format: ImageFormat
    container: Container


def negotiate(option: ImageFormat | None, accept: str | None, batch: bool, previews: bool = False) -> Representation:
    """Choose the image format and the container of a response.

    The option decides the format if it is set, otherwise the Accept header does. Formats with equal q-values are
    preferred in the order of `IMAGE_FORMATS`. One image is sent as it is, and a batch as multipart/mixed, unless the
    header prefers another container: a client that accepts only image formats accepts multipart/mixed as well. With
    `previews`, only the containers that have previews can be chosen, and such a client accepts
    multipart/x-mixed-replace. Media ranges that cannot be parsed are ignored.

    Raises:
        NotAcceptableError: the header allows neither a format nor a container, and the option is not set.
    """
    possible: Sequence[Container] = WITH_PREVIEWS if previews else get_args(Container)
    usual: Container = "events" if previews else "multipart" if batch else "none"
    if accept is None or not accept.strip():
        return Representation(option or IMAGE_FORMATS[0], usual)
    ranges = _media_ranges(accept)
    if ranges.keys() == {PROBLEM}:  # generated clients name the only response that they can parse
        return Representation(option or IMAGE_FORMATS[0], usual)
    negotiable = [name for name in available_formats() if name != "raw"]  # its media type stands for any bytes
    images: dict[ImageFormat, float] = {name: _image_quality(MEDIA_TYPES[name], ranges) for name in negotiable}
    best = max(images, key=lambda name: images[name])
    image_format = option or (best if images[best] else IMAGE_FORMATS[0])
    containers: dict[Container, float] = {
        # Wildcards do not ask for previews.
        name: ranges.get(kind, 0.0) if name in WITH_PREVIEWS and not previews else _quality(kind, ranges)
        for name, kind in CONTAINER_TYPES.items()
    }
    for_images: Container = "replace" if previews else usual
    containers[for_images] = max(containers.get(for_images, 0.0), images[best])
    container = max((name for name in possible if name in containers), key=lambda name: containers[name])
    if containers[container]:
        return Representation(image_format, container)
    if option is not None and not previews:
        return Representation(option, usual)
    images_alone = [] if previews else [MEDIA_TYPES[name] for name in negotiable]
    supported = one_of([*images_alone, *(CONTAINER_TYPES[name] for name in possible if name != "none")])
    raise NotAcceptableError(f"The Accept header allows no supported media type; accept {supported}.")


def prefers_html(accept: str) -> bool:
    """Return whether an Accept header prefers HTML to JSON, as those of browsers do for a page, but not `*/*`."""
    ranges = _media_ranges(accept)
    return _quality(HTML, ranges) > _quality(JSON, ranges)


def _image_quality(media_type: str, ranges: Mapping[str, float]) -> float:
    """Return the q-value of a format; those that only programs read must be named, because wildcards mean images."""
    return _quality(media_type, ranges) if media_type.startswith("image/") else ranges.get(media_type, 0.0)


def _quality(media_type: str, ranges: Mapping[str, float]) -> float:
    """Return the q-value of the most specific range that includes `media_type`, even if another range has a higher."""
    kind = media_type.partition("/")[0]
    return next((ranges[name] for name in (media_type, f"{kind}/*", "*/*") if name in ranges), 0.0)


def _media_ranges(accept: str) -> dict[str, float]:
    """Return the q-values of the media ranges in an Accept header that can be parsed."""
    return dict(filter(None, map(_media_range, parse_http_list(accept[:_MAX_ACCEPT]))))


def _media_range(text: str) -> tuple[str, float] | None:
    """Return a media range and its q-value, or None if the q-value is invalid."""
    name, params = header_value(text)
    try:
        weight = float(params.get("q", "1"))
    except ValueError:
        return None
    return (_ALIASES.get(name, name), weight) if 0 <= weight <= 1 else None
