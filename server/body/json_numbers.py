"""Lists of numbers in JSON, read without holding the GIL for long: long ones stay views of the body.

A list may be nested, as in `[[0.5, -2e-3], [1, 2]]`. Its numbers are read in order, whatever its nesting.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from server.errors import MalformedBodyError

FLOAT32 = np.dtype("<f4")
PIECE = 2**15  # bytes decoded at once, in about a millisecond
WINDOWS = (2**12, 2**16)  # bytes searched at once for the end of a list, first and at most

_NUMBER = b"0123456789+-.eE"
_SPACE = b" \t\r\n"
_OTHER = 2  # code of a byte that lists of numbers do not have


def _codes() -> NDArray[np.int8]:
    """Return a table of all bytes: by how much they change the depth of a list, or `_OTHER`."""
    codes = np.full(256, _OTHER, np.int8)
    codes[list(_NUMBER + _SPACE + b",")] = 0
    codes[ord("[")], codes[ord("]")] = 1, -1
    return codes


_CODES = _codes()
_OTHER_BYTE = re.compile(rb"[^][0-9+\-.eE, \t\r\n]")
_TO_SPACES = bytes.maketrans(b"[]", b"  ")
_TO_DIGITS = bytes.maketrans(_NUMBER, b"0" * len(_NUMBER))
# In a list without spaces whose numbers are digits. Empty items are found later, when the piece is parsed.
_MISPLACED = (b"0[", b"][", b"]0", b",]", b"[,", b"[]")


@dataclass(frozen=True)
class NumberList:
    """A view of a list in the body, from bracket to bracket, that has only characters of numbers and lists."""

    text: memoryview


def end_of_list(body: bytes | bytearray, start: int, end: int, least: int) -> tuple[int, bool]:
    """Find the end of the list of numbers that begins at `start` and lies within `end`.

    The `least` first bytes must belong to lists of numbers, this one or others after it.

    Returns:
        The end of the list and True. If there is no such list, the index of the first byte that does not belong to one,
        at most `end`, and False.
    """
    other = _OTHER_BYTE.search(body, start, min(end, start + least))  # fast, as there may be thousands of short lists
    if other is not None:
        return other.start(), False
    depth, window = 0, WINDOWS[0]
    while start < end:
        codes = _CODES[np.frombuffer(body, np.uint8, min(window, end - start), start)]
        others = np.flatnonzero(codes == _OTHER)
        length = int(others[0]) if len(others) else len(codes)
        depths = depth + np.cumsum(codes[:length], dtype=np.int32)
        closed = np.flatnonzero(depths == 0)
        if len(closed):
            return start + int(closed[0]) + 1, True
        if len(others):
            return start + length, False
        depth, start, window = int(depths[-1]), start + length, min(2 * window, WINDOWS[1])
    return end, False


def decode_numbers(value: object) -> NDArray[np.float32]:
    """Return the numbers in a list that `parse_json` returned, [n] float32; those out of range become infinite.

    Raises:
        MalformedBodyError: it is not a list of numbers and of such lists, or one of the lists is empty.
    """
    if isinstance(value, list):
        return _to_float32(list(_flatten(value)))
    if not isinstance(value, NumberList):
        _reject()
    data = bytearray()
    for piece in _pieces(value.text):
        try:
            numbers = json.loads(b"[%s]" % piece.translate(_TO_SPACES), parse_int=float)
        except ValueError:
            _reject()
        if not numbers:
            _reject()
        data += _to_float32(numbers).tobytes()
    return np.frombuffer(data, FLOAT32)


def _flatten(values: list[object]) -> Iterator[float]:
    """Yield the numbers in a nested list; without recursion, as it may be nested deeply."""
    if not values:
        _reject()
    pending = [iter(values)]
    while pending:
        for item in pending[-1]:
            if isinstance(item, list) and item:
                pending.append(iter(item))
                break
            if type(item) not in (int, float):
                _reject()
            yield _as_float(item)  # type: ignore[arg-type]
        else:
            pending.pop()


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if number > 0 else -math.inf


def _to_float32(numbers: list[float]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(FLOAT32)


def _pieces(text: memoryview) -> Iterator[bytes]:
    """Yield the text in pieces that end before a comma, after a check of their brackets."""
    start, last = 0, False
    while not last:
        piece = bytes(text[start : start + PIECE])
        last = start + PIECE >= len(text)
        if not last:
            piece = piece[: max(piece.rfind(b","), 0)]
            if not piece:  # no number is so long
                _reject()
        if b"[" in piece or b"]" in piece:
            # With the commas before and after the piece, its brackets can be checked without the other pieces.
            context = (b"," if start else b"") + piece + (b"" if last else b",")
            outline = context.translate(_TO_DIGITS, _SPACE)
            if any(pair in outline for pair in _MISPLACED):
                _reject()
        yield piece
        start += len(piece) + 1


def _reject() -> NoReturn:
    raise MalformedBodyError("A list in the JSON is empty or has items other than numbers; send lists of numbers only.")
