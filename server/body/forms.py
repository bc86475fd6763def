"""Bodies of multipart/form-data (RFC 7578): one file field `latent`; all other fields are options."""

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
    """One field of a form."""

    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    data: memoryview = field(default_factory=lambda: memoryview(b""))

    def disposition(self) -> dict[str, str]:
        """Return the parameters of the Content-Disposition header, `name` among them.

        Raises:
            MalformedBodyError: the part has no such header, or no name.
        """
        kind, params = header_value(self.headers.get("content-disposition", ""))
        if kind != "form-data" or "name" not in params:
            raise MalformedBodyError("A form part has no name; add Content-Disposition: form-data with a name.")
        return params


def read_form(body: bytes | bytearray, boundary: str) -> tuple[str, memoryview, list[tuple[str, str]]]:
    """Return the media type and data (a view of `body`) of the field `latent`, and the other fields as (name, text).

    Raises:
        MalformedBodyError: the form is incomplete, or has too many or too large parts.
        UnsupportedMediaTypeError: the latent is not declared as safetensors, .npy or raw bytes.
        InvalidLatentError: the form has no latent.
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
            raise MalformedBodyError("The form has more than one 'latent' field; send several latents as one batch.")
    if latent is None:
        raise InvalidLatentError("The form has no field 'latent'; attach the latent as a file with this name.")
    return *latent, fields


def _split(body: bytes | bytearray, boundary: str) -> list[Part]:
    """Split a complete form into its parts, whose data are views of `body`."""
    if not boundary or not boundary.isascii():
        raise MalformedBodyError("The form's Content-Type has no boundary; let your HTTP client write the header.")
    # The parser reads byte by byte in Python; these searches reject early what would keep it busy.
    delimiter = b"\r\n--" + boundary.encode()
    if body.count(delimiter) > MAX_PARTS:
        raise MalformedBodyError(f"The form has more than {MAX_PARTS} parts; send only the latent and options.")
    if delimiter + b" " in body or delimiter + b"\t" in body:
        raise MalformedBodyError("The form has whitespace after a boundary; let your HTTP client write the form.")
    collector = _Collector(memoryview(body))
    try:
        MultipartParser(
            boundary,
            {
                "on_part_begin": collector.begin_part,
                "on_header_field": collector.header_name,
                "on_header_value": collector.header_value,
                "on_part_data": collector.part_data,
                "on_end": collector.end,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_SIZE,
        ).write(body)  # type: ignore[arg-type]
    except FormParserError:
        raise MalformedBodyError("The form is not valid multipart/form-data; let your HTTP client write it.") from None
    if not collector.complete:
        raise MalformedBodyError("The form ends before its closing boundary; send all of it.")
    return collector.parts


class _Collector:
    """Callbacks of the form parser. The whole body is written at once, so each callback gets a complete item."""

    def __init__(self, body: memoryview) -> None:
        self.parts: list[Part] = []
        self.complete = False
        self._body = body
        self._name = ""  # of the header whose value comes next

    def begin_part(self) -> None:
        self.parts.append(Part())

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name = str(self._body[start:end], "ascii").lower()

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].headers[self._name] = str(self._body[start:end], "utf-8", "replace")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data = self._body[start:end]

    def end(self) -> None:
        self.complete = True


def _file_type(content_type: str, filename: str) -> str:
    """Return the media type of the latent's file, by its declared type or its name."""
    declared, _ = header_value(content_type)
    suffix = PurePosixPath(filename.lower()).suffix
    if suffix in PICKLE_SUFFIXES:
        raise unsupported(f"A {suffix} file may be a pickle, and pickles are never opened")
    if declared in (SAFETENSORS, NPY):
        return declared
    if suffix in MEDIA_TYPE_OF:  # HTTP clients often declare application/octet-stream for any file
        return MEDIA_TYPE_OF[suffix]
    if declared == RAW:
        return RAW
    raise unsupported(f"The form's latent has Content-Type {quote(content_type)} and file name {quote(filename)}")


def _text(data: memoryview) -> str:
    try:
        if len(data) <= MAX_OPTION_SIZE:
            return str(data, "utf-8")
    except UnicodeDecodeError:
        pass
    raise MalformedBodyError(f"Form fields other than 'latent' must be UTF-8 text of at most {MAX_OPTION_SIZE} bytes.")
