"""JSON bodies, read without holding the GIL for long: large values stay views of the body and are decoded piecewise.

`json.loads` holds the GIL from beginning to end, so that a large body would stop the event loop even from a thread.
Base64, prompts and lists of numbers may be large.
"""

from __future__ import annotations

import binascii
import json
import secrets
from collections.abc import Iterator
from typing import Any, NoReturn, TypeAlias

from server.body.json_numbers import NumberList, end_of_list
from server.errors import MalformedBodyError

MAX_JSON_TEXT = 2**16  # bytes without the long values; text of this size expands to little memory
LONG_VALUE = 1024  # bytes; longer strings and lists of numbers stay views of the body
MAX_ESCAPED_QUOTES = 2**14  # in long strings; each one costs a search. Base64 has none, but prompts may have some
PIECE = 2**18  # bytes of base64 decoded at once, in about a millisecond

LongValue: TypeAlias = memoryview | NumberList

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """Parse a JSON object in UTF-8; duplicate keys, NaN and infinities are rejected.

    If the body has more than `MAX_JSON_TEXT` bytes, strings and lists of numbers of more than `LONG_VALUE` bytes that
    are values of objects, or items of such values, stay views of the body. A string is returned as a `memoryview` of
    the text between the quotes; decode it with `decode_base64` or `decode_text`. A list is returned as a `NumberList`;
    decode it with `decode_numbers`.

    Raises:
        MalformedBodyError: the body is not such an object, or is too large without its long values.
    """
    text, long_values = _cut_long_values(body) if len(body) > MAX_JSON_TEXT else (body, {})

    def restore(x: Any) -> Any:
        return long_values.get(x, x) if isinstance(x, str) else x

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = {name: list(map(restore, x)) if isinstance(x, list) else restore(x) for name, x in pairs}
        if len(value) < len(pairs):  # parsers differ in which value they keep
            raise MalformedBodyError("A JSON object has a duplicate key; use each key once.")
        if not long_values.keys().isdisjoint(value):
            raise MalformedBodyError(f"A JSON object has a key of more than {LONG_VALUE} bytes; remove it.")
        return value

    try:
        value = json.loads(str(text, "utf-8"), object_pairs_hook=build_object, parse_constant=_reject_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError, JSONDecodeError, an integer of thousands of digits
        raise _invalid() from None
    if not isinstance(value, dict):
        raise MalformedBodyError("The JSON is not an object; send {...}.")
    return value


def decode_text(text: str | memoryview) -> str:
    """Decode a string that `parse_json` returned. Raises MalformedBodyError if it is not a JSON string."""
    if isinstance(text, str):
        return text
    try:
        value: str = json.loads(f'"{str(text, "utf-8")}"')
    except ValueError:
        raise _invalid() from None
    return value


def decode_base64(text: str | memoryview) -> bytes | bytearray:
    """Decode a string that `parse_json` returned: base64 with the plain or the URL-safe alphabet.

    Padding may be missing, and lines may be wrapped as in MIME.

    Raises:
        ValueError: it is not such base64.
    """
    data, pending, ended = bytearray(), b"", False
    alphabets = [False, False]  # whether characters of the plain or the URL-safe alphabet alone have occurred
    for piece in [_unwrap(text.encode("ascii"))] if isinstance(text, str) else _pieces(text):
        pending += _plain_alphabet(piece, alphabets)
        whole = len(pending) - len(pending) % 4
        if ended and pending:
            raise ValueError("data after the padding")
        decoded = binascii.a2b_base64(pending[:whole], strict_mode=True)
        ended = 4 * len(decoded) < 3 * whole
        data += decoded
        pending = pending[whole:]
    if pending and (ended or b"=" in pending):
        raise ValueError("data after the padding, or incomplete padding")
    data += binascii.a2b_base64(pending + b"=" * (-len(pending) % 4), strict_mode=True)
    return data


def _unwrap(piece: bytes) -> bytes:
    """Return base64 without line breaks."""
    return piece.translate(None, b"\r\n") if b"\n" in piece or b"\r" in piece else piece


def _plain_alphabet(piece: bytes, alphabets: list[bool]) -> bytes:
    """Return base64 in the plain alphabet; update whether `alphabets` of earlier pieces were plain and URL-safe."""
    alphabets[0] |= b"+" in piece or b"/" in piece
    alphabets[1] |= b"-" in piece or b"_" in piece
    if all(alphabets):
        raise ValueError("two alphabets")
    return piece.translate(_URL_SAFE) if alphabets[1] else piece


class _Cutter:
    """Copy of a JSON text in which long values are replaced by short strings."""

    def __init__(self, body: bytes | bytearray) -> None:
        self.text = bytearray()
        self.long_values: dict[str, LongValue] = {}  # by the strings that replace them
        self.view = memoryview(body)
        self._secret = secrets.token_hex(16)  # the body cannot contain it
        self._kept = 0  # end of the bytes copied to `text`

    def cut(self, start: int, end: int, value: LongValue) -> None:
        """Replace the bytes `start` to `end` of the body, which are `value`."""
        name = f"{self._secret}{len(self.long_values)}"
        self.long_values[name] = value
        self.text += self.view[self._kept : start]
        self.text += f'"{name}"'.encode()
        self._kept = end

    def fits(self, end: int) -> bool:
        """Return whether the copy of the body up to `end` is within the limit."""
        return len(self.text) + end - self._kept <= MAX_JSON_TEXT

    def finish(self) -> bytearray:
        """Copy the rest of the body and return the text."""
        if not self.fits(len(self.view)):
            raise MalformedBodyError(
                f"The JSON has more than {MAX_JSON_TEXT} bytes without its base64 and lists of numbers; send tensors "
                "as base64."
            )
        self.text += self.view[self._kept :]
        return self.text


def _cut_long_values(body: bytes | bytearray) -> tuple[bytearray, dict[str, LongValue]]:
    """Return the text with each long value replaced by a short string, and the values by these strings."""
    cutter = _Cutter(body)
    quotes = MAX_ESCAPED_QUOTES
    end = 0  # of the last string
    while (start := body.find(b'"', end)) >= 0:
        _cut_lists(cutter, body, end, start)
        if not cutter.fits(start):
            break
        stop, quotes = _closing_quote(body, start + 1, quotes)
        if stop - start > LONG_VALUE:
            cutter.cut(start, stop + 1, cutter.view[start + 1 : stop])
        end = stop + 1
    else:
        _cut_lists(cutter, body, end, len(body))
    return cutter.finish(), cutter.long_values


def _cut_lists(cutter: _Cutter, body: bytes | bytearray, start: int, stop: int) -> None:
    """Cut the long lists of numbers from `start` to `stop`, where the body has no strings."""
    while stop - start > LONG_VALUE and (start := body.find(b"[", start, stop)) >= 0 and cutter.fits(start):
        end, complete = end_of_list(body, start, stop, LONG_VALUE)
        if not complete:
            start = end
        elif end - start > LONG_VALUE:
            cutter.cut(start, end, NumberList(cutter.view[start:end]))
            start = end
        else:  # not to `end`, because the time would not be proportional to the body if it had many short lists
            start += LONG_VALUE


def _closing_quote(body: bytes | bytearray, start: int, quotes: int) -> tuple[int, int]:
    """Return the index of the quote that closes the string from `start`, and how many of `quotes` are left.

    These are the escaped quotes that long strings may have.
    """
    stop = start - 1
    while (stop := body.find(b'"', stop + 1)) >= 0:
        content = body[max(start, stop - LONG_VALUE) : stop]
        backslashes = len(content) - len(content.rstrip(b"\\"))
        if backslashes % 2 == 0:
            return stop, quotes
        if stop - start > LONG_VALUE:
            quotes -= 1
            if quotes < 0:
                raise MalformedBodyError(
                    f"Long strings in the JSON have more than {MAX_ESCAPED_QUOTES} escaped quotes; send fewer."
                )
    raise _invalid()


def _pieces(text: memoryview) -> Iterator[bytes]:
    """Yield base64 in pieces, with JSON's escape sequences replaced and without line breaks.

    Some writers escape the + or / of base64. Line breaks are always escaped in JSON.
    """
    start = 0
    while start < len(text):
        piece = bytes(text[start : start + PIECE])
        if b"\\" in piece:
            # An escape sequence has up to six characters. If the piece ends in one, the next piece begins with it.
            last = piece.rfind(b"\\", len(piece) - 5) if start + PIECE < len(text) else -1
            piece = piece if last < 0 else piece[:last]
            yield _unwrap(json.loads(f'"{piece.decode("ascii")}"').encode("ascii"))
        else:
            yield piece
        start += len(piece)


def _reject_constant(name: str) -> NoReturn:
    raise MalformedBodyError(f"{name} is not valid JSON; send finite numbers only.")


def _invalid() -> MalformedBodyError:
    return MalformedBodyError("The JSON is invalid; send one complete object in UTF-8.")
