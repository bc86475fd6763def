"""Tensors as they arrive: safetensors, .npy, raw bytes or base64, found in the body without a copy.

A header may claim any shape, so nothing is allocated until the claim has been held against the bytes that are there.
"""

from __future__ import annotations

import ast
import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch

from engines.errors import PidError
from server.body.media import unsupported
from server.body.quoting import one_of, quote
from server.errors import InvalidCaptionError, InvalidLatentError, MalformedBodyError

Buffer: TypeAlias = bytes | bytearray | memoryview

STORED_AS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}
PLAIN_DTYPES = {name: name for name in STORED_AS}
SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
NPY_DTYPES = {"<f2": "float16", "<f4": "float32"}

ERRORS: dict[str, type[PidError]] = {"latent": InvalidLatentError, "caption": InvalidCaptionError}
RANKS = {"latent": (3, 4), "caption": (2, 3)}
LAYOUTS = {
    "latent": "[channels, h, w] or [batch, channels, h, w]",
    "caption": "[tokens, width] or [batch, tokens, width]",
}

MAX_SAFETENSORS_HEADER = 2**16 - 1  # bytes; so short that its length never reads as the start of a pickle
MAX_NPY_HEADER = 1024  # bytes; NumPy writes 128, and literal_eval recurses as deep as its text nests
MAX_SMALL_JSON = 2**16  # characters; a text of this size cannot unfold to much
MAX_JSON_ITEMS = 1000  # in a larger one; a request has about twenty, and each can take thirty times its bytes


@dataclass(frozen=True)
class RawTensor:
    """A tensor where it lies in the body: shape, dtype and bytes agree, the values are yet unread.

    Raises when made:
        InvalidLatentError, InvalidCaptionError: a number of dimensions that is never taken.
        MalformedBodyError: a shape that does not agree with the bytes.
    """

    name: str  # "latent" or "caption"
    dtype: str  # a key of STORED_AS
    shape: tuple[int, ...]
    data: Buffer
    order: Literal["C", "F"] = "C"

    def __post_init__(self) -> None:
        if len(self.shape) not in RANKS[self.name]:
            raise invalid(self.name, f"has {len(self.shape)} dimensions; send it as {LAYOUTS[self.name]}")
        size = math.prod(self.shape) * STORED_AS[self.dtype].itemsize
        if min(self.shape) < 0 or size != len(self.data):
            raise MalformedBodyError(
                f"The {self.name} comes in {len(self.data)} bytes, which disagrees with its shape "
                f"{quote(self.shape)} in {self.dtype}; send every element and nothing else."
            )

    def to_float32(self) -> torch.Tensor:
        """A new contiguous float32 tensor of `shape`, which must not be empty; NaN and infinity raise."""
        stored = np.frombuffer(self.data, STORED_AS[self.dtype]).reshape(self.shape, order=self.order)
        if self.dtype == "bfloat16":  # the upper half of a float32
            bits = stored.astype(np.uint32, order="C")
            bits <<= 16
            values = torch.from_numpy(bits.view(np.float32))
        else:
            values = torch.from_numpy(stored.astype(np.float32, order="C"))
        low, high = torch.aminmax(values)  # one pass and no mask; a NaN takes both
        if not (low.isfinite() and high.isfinite()):
            raise invalid(self.name, "holds NaN or infinity; send finite values only")
        return values


def invalid(name: str, complaint: str) -> PidError:
    """The error for the latent or the caption; `complaint` follows "The latent" or "The caption"."""
    return ERRORS[name](f"The {name} {complaint}.")


def dtype_of(name: str, word: object, known: dict[str, str]) -> str:
    """The dtype that a format calls `word`; any other than the `known` raises as `invalid`."""
    if isinstance(word, str) and word in known:
        return known[word]
    raise invalid(name, f"has dtype {quote(word)}; send it as little-endian {one_of(known.values())}")


def dimensions(shape: Sequence[object]) -> tuple[int, ...]:
    """`shape` as integers, or MalformedBodyError."""
    if not all(type(size) is int for size in shape):
        raise MalformedBodyError("A shape holds something else than whole numbers; send it like [16, 64, 64].")
    return tuple(shape)  # type: ignore[arg-type]


def read_safetensors(body: Buffer) -> dict[str, RawTensor]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, the data."""
    view = memoryview(body)
    length = int.from_bytes(view[:8], "little")
    if not 2 <= length <= min(len(view) - 8, MAX_SAFETENSORS_HEADER):
        _malformed_safetensors("its header is cut short or over 64 KB")
    header, data = parse_json(view[8 : 8 + length]), view[8 + length :]
    header.pop("__metadata__", None)
    if unknown := [name for name in header if name not in ERRORS]:
        names = quote(", ".join(unknown))
        raise InvalidLatentError(f"The tensors taken are latent and, where wanted, caption; leave out {names}.")
    tensors, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": word, "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                dtype = dtype_of(name, word, SAFETENSORS_DTYPES)
                tensors[name] = RawTensor(name, dtype, dimensions(shape), data[begin:end])
                spans.append((begin, end))
            case _:
                _malformed_safetensors(f"the entry of {name} lacks a dtype, shape or data_offsets")
    begins, ends = zip(*sorted(spans), strict=True) if spans else ((), ())
    if (*begins, len(data)) != (0, *ends):  # the format has no gaps and no overlaps
        _malformed_safetensors("its tensors do not fill it from end to end")
    return tensors


def _malformed_safetensors(complaint: str) -> NoReturn:
    raise MalformedBodyError(f"This is no complete safetensors file, as {complaint}; save it anew and send all of it.")


def read_npy(body: Buffer) -> RawTensor:
    """The latent in an .npy file, versions 1 to 3, in C or Fortran order."""
    view = memoryview(body)
    if len(view) < 12 or bytes(view[:6]) != b"\x93NUMPY" or view[6] not in (1, 2, 3):
        raise MalformedBodyError("The body does not begin as an .npy file does; save the latent with numpy.save.")
    start = 10 if view[6] == 1 else 12
    end = start + int.from_bytes(view[8:start], "little")
    if end > min(len(view), start + MAX_NPY_HEADER):
        raise MalformedBodyError("The .npy header is cut short or over 1 KB; save the latent with numpy.save.")
    try:
        header = ast.literal_eval(str(view[start:end], "utf-8" if view[6] == 3 else "latin-1"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        header = None
    match header:
        case {"descr": word, "fortran_order": bool(fortran), "shape": tuple(shape)}:
            dtype = dtype_of("latent", word, NPY_DTYPES)
            return RawTensor("latent", dtype, dimensions(shape), view[end:], "F" if fortran else "C")
    raise MalformedBodyError("The .npy header cannot be read; save the latent with numpy.save.")


def read_raw(name: str, data: Buffer, shape: tuple[int, ...], dtype: str) -> RawTensor:
    """Plain little-endian elements in C order, `dtype` one of float16, bfloat16, float32."""
    try:
        return RawTensor(name, dtype_of(name, dtype, PLAIN_DTYPES), shape, data)
    except MalformedBodyError:
        refuse_pickle(data)  # only now: numbers of the right size may begin with any bytes
        raise


def read_base64(name: str, value: Any) -> RawTensor:
    """A tensor in JSON: `{"data": base64, "shape": [...], "dtype": "float32"}`."""
    match value:
        case {"data": str(text), "shape": list(shape), "dtype": str(dtype)} if len(value) == 3:
            try:
                data = base64.b64decode(text, validate=True)
            except ValueError:
                raise MalformedBodyError(
                    f"The data of {name} is not base64; encode its raw bytes with padding."
                ) from None
            return read_raw(name, data, dimensions(shape), dtype)
    raise MalformedBodyError(f"Send {name} as an object of data (base64), shape (a list) and dtype, and nothing else.")


def parse_json(body: Buffer) -> dict[str, Any]:
    """A JSON object in UTF-8; duplicate names, NaN and infinities are refused, as is whatever would unfold hugely.

    Raises:
        MalformedBodyError: the body is none.
    """
    try:
        text = str(body, "utf-8")
        if len(text) > MAX_SMALL_JSON and sum(map(text.count, ",[{")) > MAX_JSON_ITEMS:
            raise MalformedBodyError(
                f"The JSON holds over {MAX_JSON_ITEMS} values; send tensors as base64, not as lists."
            )
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError, JSONDecodeError, an integer of thousands of digits
        raise MalformedBodyError("The JSON cannot be read; send one complete object in UTF-8.") from None
    if not isinstance(value, dict):
        raise MalformedBodyError("The JSON is not an object; send one, as in {...}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # parsers differ in which they keep
        raise MalformedBodyError("The JSON has one name twice in an object; give each name once.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedBodyError(f"JSON has no {name}; send finite numbers only.")


def refuse_pickle(data: Buffer) -> None:
    """Refuse what torch.save, pickle or a zip writer made: pickles run code when opened."""
    head = bytes(data[:4])
    # The third byte tells a pickle's first opcode from a safetensors header length, where it is 0.
    pickled = len(head) > 2 and head[0] == 0x80 and 1 <= head[1] <= 5 and head[2] != 0
    if pickled or head == b"PK\x03\x04":
        raise unsupported("Pickles and zip archives, as torch.save writes them, are never opened")
