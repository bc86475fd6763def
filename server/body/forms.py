"""multipart/form-data: one file field `latent`, the rest options (RFC 7578)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from server.body.media import NPY, RAW, SAFETENSORS, header_value, unsupported
from server.body.quoting import quote
from server.errors import InvalidLatentError, MalformedBodyError

MAX_PARTS = 16
MAX_HEADERS = 8  # per part
MAX_HEADER_SIZE = 1024  # bytes
MAX_OPTION_SIZE = 256  # bytes

MEDIA_TYPE_OF = {".safetensors": SAFETENSORS, ".npy": NPY}
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass
class Part:
    headers: dict[str, str] = field(default_factory=dict)
    data: memoryview = field(default_factory=lambda: memoryview(b""))

    def disposition(self) -> dict[str, str]:
        kind, params = header_value(self.headers.get("content-disposition", ""))
        if kind != "form-data" or "name" not in params:
            raise MalformedBodyError("A part of the form has no name; give it a Content-Disposition of form-data.")
        return params


def read_form(body: bytes | bytearray, boundary: str) -> tuple[str, memoryview, list[tuple[str, str]]]:
    """The media type and bytes of the field `latent`, a view of `body`, and all other fields as name and text.

    Raises:
        MalformedBodyError: not a complete form, or one with too many or too large parts.
        UnsupportedMediaTypeError: a latent that is declared as something else than safetensors, .npy or raw bytes.
        InvalidLatentError: no latent in it.
    """
    latent: tuple[str, memoryview] | None = None
    fields: list[tuple[str, str]] = []
    for part in _split(body, boundary):
        params = part.disposition()
        if params["name"] != "latent":
            fields.append((params["name"], _text(part.data)))
        elif latent is None:
            latent = _file_type(part.headers.get("content-type", ""), params.get("filename", "")), part.data
        else:
            raise MalformedBodyError("The form has two fields latent; put all latents of a request in one batch.")
    if latent is None:
        raise InvalidLatentError("The form has no field latent; attach the latent as a file under this name.")
    return *latent, fields


def _split(body: bytes | bytearray, boundary: str) -> list[Part]:
    if not boundary or not boundary.isascii():
        raise MalformedBodyError("The Content-Type of the form names no boundary; let your HTTP client write it.")
    # What the parser would walk through byte by byte is refused by fast searches first.
    delimiter = b"\r\n--" + boundary.encode()
    if body.count(delimiter) > MAX_PARTS:
        raise MalformedBodyError(f"The form has over {MAX_PARTS} parts; send the latent and options only.")
    if delimiter + b" " in body or delimiter + b"\t" in body:
        raise MalformedBodyError("The form has blanks after a boundary; let your HTTP client write it.")
    view = memoryview(body)
    parts: list[Part] = []
    names: list[str] = []
    closed: list[bool] = []

    # All is written to the parser at once, so each callback gets its item whole.
    def header_field(data: bytes, start: int, end: int) -> None:
        names.append(str(view[start:end], "ascii").lower())

    def header_content(data: bytes, start: int, end: int) -> None:
        parts[-1].headers[names[-1]] = str(view[start:end], "utf-8", "replace")

    def part_data(data: bytes, start: int, end: int) -> None:
        parts[-1].data = view[start:end]

    try:
        MultipartParser(
            boundary,
            {
                "on_part_begin": lambda: parts.append(Part()),
                "on_header_field": header_field,
                "on_header_value": header_content,
                "on_part_data": part_data,
                "on_end": lambda: closed.append(True),
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_SIZE,
        ).write(body)  # type: ignore[arg-type]
    except FormParserError:
        raise MalformedBodyError("The form cannot be read; let your HTTP client write multipart/form-data.") from None
    if not closed:
        raise MalformedBodyError("The form ends before its closing boundary; send all of it.")
    return parts


def _file_type(content_type: str, filename: str) -> str:
    declared, _ = header_value(content_type)
    suffix = PurePosixPath(filename.lower()).suffix
    if suffix in PICKLE_SUFFIXES:
        raise unsupported(f"A {suffix} file may be a pickle, which is never opened")
    if declared in (SAFETENSORS, NPY):
        return declared
    if suffix in MEDIA_TYPE_OF:  # clients that know no better declare application/octet-stream
        return MEDIA_TYPE_OF[suffix]
    if declared == RAW:
        return RAW
    raise unsupported(f"The latent in the form has Content-Type {quote(content_type)} and file name {quote(filename)}")


def _text(data: memoryview) -> str:
    try:
        if len(data) <= MAX_OPTION_SIZE:
            return str(data, "utf-8")
    except UnicodeDecodeError:
        pass
    raise MalformedBodyError(
        f"A field beside latent is no text of up to {MAX_OPTION_SIZE} bytes; send options in them."
    )
