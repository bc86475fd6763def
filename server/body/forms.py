"""Bodies of multipart/form-data (RFC 7578): one file field `latent`; all other fields are options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from engines.captions.prompts import MAX_CHARACTERS
from server.body.detection import UNSPECIFIC_TYPES
from server.body.media import NPY, SAFETENSORS, header_value, unsupported
from server.body.prompts import prompt_too_long
from server.body.quoting import quote
from server.errors import InvalidLatentError, MalformedBodyError

MAX_BOUNDARY = 70  # characters; RFC 2046
MAX_PARTS = 272  # the latent, 15 options, and a prompt for each of 256 images
MAX_HEADERS = 8  # per part
MAX_HEADER_SIZE = 1024  # bytes
MAX_OPTION_SIZE = 256  # bytes, except for a prompt
MAX_PROMPT_SIZE = 4 * MAX_CHARACTERS  # bytes

MEDIA_TYPE_OF = {".safetensors": SAFETENSORS, ".npy": NPY}
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_HEADER = re.compile(rb"([!#-'*+\-.0-9A-Z^-z|~]+):([^\r\n]*)")
_WINDOW = 2**20  # bytes searched at once; a search holds the GIL and needs up to 7 ns per byte


@dataclass(frozen=True)
class Part:
    """One field of a form."""

    headers: dict[str, str]  # names in lower case
    data: memoryview

    def disposition(self) -> dict[str, str]:
        """Return the parameters of the Content-Disposition header, `name` among them.

        Raises:
            MalformedBodyError: the part has no such header, or no name.
        """
        kind, params = header_value(self.headers.get("content-disposition", ""))
        if kind != "form-data" or "name" not in params:
            raise MalformedBodyError("A form part has no name; add Content-Disposition: form-data with a name.")
        return params


def check_boundary(boundary: str) -> None:
    """Raise MalformedBodyError unless the boundary of a form's Content-Type is valid."""
    if not 1 <= len(boundary) <= MAX_BOUNDARY or not boundary.isascii():
        raise MalformedBodyError("The form's Content-Type has no boundary; let your HTTP client write the header.")


def read_form(body: bytes | bytearray, boundary: str) -> tuple[str | None, memoryview, list[tuple[str, str]]]:
    """Return media type and data (a view of `body`) of the field `latent`, and the other fields as (name, text).

    The media type is None if it is not declared.

    Raises:
        MalformedBodyError: the form is incomplete, or has too many or too large parts.
        InvalidOptionError: a prompt is far too long.
        UnsupportedMediaTypeError: the latent is declared as something other than safetensors, .npy or raw bytes.
        InvalidLatentError: the form has no latent.
    """
    latent: tuple[str | None, memoryview] | None = None
    fields: list[tuple[str, str]] = []
    for part in _split(body, boundary):
        params = part.disposition()
        if params["name"] != "latent":
            fields.append((params["name"], _text(params["name"], part.data)))
        elif latent is None:
            latent = _file_type(part.headers.get("content-type", ""), params.get("filename", "")), part.data
        else:
            raise MalformedBodyError("The form has more than one 'latent' field; send several latents as one batch.")
    if latent is None:
        raise InvalidLatentError("The form has no field 'latent'; attach the latent as a file with this name.")
    return *latent, fields


def _split(body: bytes | bytearray, boundary: str) -> Iterator[Part]:
    """Yield the parts of a complete form; text before the first boundary and after the last one is ignored.

    RFC 2046, 5.1.1. A boundary is at the beginning of a line, and nothing but a line break follows it, or `--` if it is
    the last one.
    """
    delimiter = b"\r\n--" + boundary.encode()
    parts = 0
    place = 0 if body.startswith(delimiter[2:]) else 2 + _find(body, delimiter, 0)  # of the current boundary
    while True:
        start = place + len(delimiter) - 2
        ending = body[start : start + 2]
        if ending == b"--":
            return
        if ending != b"\r\n":
            raise MalformedBodyError("A boundary of the form has other text after it; let your HTTP client write it.")
        parts += 1
        if parts > MAX_PARTS:
            raise MalformedBodyError(f"The form has more than {MAX_PARTS} parts; send only the latent and options.")
        headers, begin = _headers(body, start)
        end = _find(body, delimiter, begin)
        yield Part(headers, memoryview(body)[begin:end])
        place = end + 2


def _find(body: bytes | bytearray, delimiter: bytes, start: int) -> int:
    """Return the index of the next delimiter."""
    for window in range(start, len(body), _WINDOW):
        index = body.find(delimiter, window, window + _WINDOW + len(delimiter) - 1)
        if index >= 0:
            return index
    raise MalformedBodyError("The form ends before its closing boundary; send all of it.")


def _headers(body: bytes | bytearray, start: int) -> tuple[dict[str, str], int]:
    """Return the headers of the part whose boundary ends at `start`, and the index of its data."""
    end = body.find(b"\r\n\r\n", start, start + MAX_HEADERS * MAX_HEADER_SIZE)
    if end >= 0:
        lines = bytes(body[start + 2 : end]).split(b"\r\n") if end > start else []
        matches = [_HEADER.fullmatch(line) for line in lines if len(line) <= MAX_HEADER_SIZE]
        headers = {m[1].decode().lower(): m[2].decode("utf-8", "replace").strip() for m in matches if m is not None}
        if len(headers) == len(lines) <= MAX_HEADERS:
            return headers, end + 4
    raise MalformedBodyError(
        f"The headers of a form part are malformed, repeated, or more than {MAX_HEADERS} with {MAX_HEADER_SIZE} bytes "
        "each; let your HTTP client write the form."
    )


def _file_type(content_type: str, filename: str) -> str | None:
    """Return the media type of the latent's file by its declared type or its name, or None if neither shows it."""
    declared, _ = header_value(content_type)
    suffix = PurePosixPath(filename.lower()).suffix
    if suffix in PICKLE_SUFFIXES:
        raise unsupported(f"A {suffix} file may be a pickle, and pickles are never opened")
    if declared in (SAFETENSORS, NPY):
        return declared
    if suffix in MEDIA_TYPE_OF:  # HTTP clients often declare application/octet-stream for any file
        return MEDIA_TYPE_OF[suffix]
    if declared in UNSPECIFIC_TYPES:
        return None
    raise unsupported(f"The form's latent has Content-Type {quote(content_type)} and file name {quote(filename)}")


def _text(name: str, data: memoryview) -> str:
    if name == "prompt" and len(data) > MAX_PROMPT_SIZE:
        raise prompt_too_long()
    try:
        if name == "prompt" or len(data) <= MAX_OPTION_SIZE:
            return str(data, "utf-8")
    except UnicodeDecodeError:
        pass
    raise MalformedBodyError(
        f"Form fields other than 'latent' must be UTF-8 text, and at most {MAX_OPTION_SIZE} bytes except for 'prompt'."
    )
