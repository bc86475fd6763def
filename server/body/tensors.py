"""Tensors in a body: safetensors, .npy, raw bytes or base64, located without copying the data.

A header may claim any shape, so nothing is allocated until the claim agrees with the number of bytes received.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch

from engines.errors import PidError
from server.body.json_numbers import decode_numbers
from server.body.json_text import decode_base64, parse_json
from server.body.media import unsupported
from server.body.quoting import one_of, quote
from server.errors import InvalidCaptionError, InvalidLatentError, MalformedBodyError, count_of
from server.request import MAX_MAGNITUDE

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
RANKS = {"latent": (3, 4, 5), "caption": (2, 3)}
LAYOUTS = {
    "latent": "[channels, h, w] or [batch, channels, h, w]",
    "caption": "[tokens, width] or [batch, tokens, width]",
}

MAX_SAFETENSORS_HEADER = 2**16 - 1  # bytes; short enough that its length never reads as the start of a pickle
NPY_MAGIC = b"\x93NUMPY"
MAX_NPY_HEADER = 1024  # bytes; NumPy writes 128, and literal_eval recurses as deep as the text is nested


@dataclass(frozen=True)
class RawTensor:
    """A view of a tensor in the body, whose values are not read yet.

    Raises when constructed:
        InvalidLatentError, InvalidCaptionError: the number of dimensions is not supported.
        MalformedBodyError: the shape and dtype do not agree with the number of bytes.
    """

    name: str  # "latent" or "caption"
    dtype: str  # a key of STORED_AS
    shape: tuple[int, ...]
    data: Buffer
    order: Literal["C", "F"] = "C"

    def __post_init__(self) -> None:
        check_rank(self.name, self.shape)
        check_size(self.name, self.shape, self.dtype, len(self.data))

    def to_float32(self) -> torch.Tensor:
        """Return a new contiguous float32 tensor of `shape`, which must not be empty.

        Raises:
            InvalidLatentError, InvalidCaptionError: a value is NaN, infinite or larger than `MAX_MAGNITUDE`.
        """
        stored = np.frombuffer(self.data, STORED_AS[self.dtype]).reshape(self.shape, order=self.order)
        if self.dtype == "bfloat16":  # the upper half of a float32
            bits = stored.astype(np.uint32, order="C")
            bits <<= 16
            values = torch.from_numpy(bits.view(np.float32))
        else:
            values = torch.from_numpy(stored.astype(np.float32, order="C"))
        low, high = torch.aminmax(values)  # a single pass without a mask; a NaN makes both of them NaN
        if not (low.isfinite() and high.isfinite()):
            raise invalid(self.name, "contains NaN or infinity; send finite values only")
        if max(-low, high) > MAX_MAGNITUDE:
            raise invalid(self.name, f"has values over {MAX_MAGNITUDE:g} in magnitude; check that it is normalised")
        return values


def check_rank(name: str, shape: Sequence[int]) -> None:
    """Raise the error for the tensor `name` if its number of dimensions is not supported."""
    if len(shape) not in RANKS[name]:
        raise invalid(name, f"has {count_of(len(shape), 'dimension')}; send it as {LAYOUTS[name]}")


def check_size(name: str, shape: Sequence[int], dtype: str, nbytes: int) -> None:
    """Raise MalformedBodyError unless a tensor of this shape and dtype has `nbytes` bytes."""
    if min(shape) < 0 or math.prod(shape) * STORED_AS[dtype].itemsize != nbytes:
        raise MalformedBodyError(
            f"The {name} has {count_of(nbytes, 'byte')}, which does not match its shape {quote(tuple(shape))} "
            f"and dtype {dtype}; send every element and nothing else."
        )


def invalid(name: str, complaint: str) -> PidError:
    """Return the error for the tensor `name`; `complaint` continues "The latent …" or "The caption …"."""
    return ERRORS[name](f"The {name} {complaint}.")


def read_safetensors(body: Buffer) -> dict[str, RawTensor]:
    """Read a safetensors file: 8 bytes of header length, a JSON header, the data.

    Raises:
        MalformedBodyError: the file is truncated or invalid.
        InvalidLatentError, InvalidCaptionError: a tensor has an unexpected name, dtype or number of dimensions.
    """
    view = memoryview(body)
    length = int.from_bytes(view[:8], "little")
    if not 2 <= length <= min(len(view) - 8, MAX_SAFETENSORS_HEADER):
        _malformed_safetensors("the header is truncated or longer than 64 KiB")
    header, data = parse_json(bytes(view[8 : 8 + length])), view[8 + length :]
    header.pop("__metadata__", None)
    if unexpected := [name for name in header if name not in ERRORS]:
        names = quote(", ".join(unexpected))
        raise InvalidLatentError(f"Unexpected tensors {names}; send only 'latent' and, optionally, 'caption'.")
    tensors, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": code, "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                dtype = _dtype(name, code, SAFETENSORS_DTYPES)
                tensors[name] = RawTensor(name, dtype, _dimensions(shape), data[begin:end])
                spans.append((begin, end))
            case _:
                _malformed_safetensors(f"the entry of {name} lacks a valid dtype, shape or data_offsets")
    begins, ends = zip(*sorted(spans), strict=True) if spans else ((), ())
    if (*begins, len(data)) != (0, *ends):  # the format allows neither gaps nor overlaps
        _malformed_safetensors("the tensors do not cover the data exactly")
    return tensors


def _malformed_safetensors(complaint: str) -> NoReturn:
    raise MalformedBodyError(f"Invalid or truncated safetensors file: {complaint}.")


def read_npy(body: Buffer) -> RawTensor:
    """Read the latent from an .npy file, version 1 to 3, in C or Fortran order.

    Raises:
        MalformedBodyError: the file is truncated or invalid.
        InvalidLatentError: the dtype or the number of dimensions is not supported.
    """
    view = memoryview(body)
    if len(view) < 12 or bytes(view[:6]) != NPY_MAGIC or view[6] not in (1, 2, 3):
        raise MalformedBodyError("The body is not an .npy file; save the latent with numpy.save.")
    start = 10 if view[6] == 1 else 12
    end = start + int.from_bytes(view[8:start], "little")
    if end > min(len(view), start + MAX_NPY_HEADER):
        raise MalformedBodyError("The .npy header is truncated or longer than 1 KiB; save the latent with numpy.save.")
    try:
        header = ast.literal_eval(str(view[start:end], "utf-8" if view[6] == 3 else "latin-1"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        header = None
    match header:
        case {"descr": code, "fortran_order": bool(fortran), "shape": tuple(shape)}:
            dtype = _dtype("latent", code, NPY_DTYPES)
            return RawTensor("latent", dtype, _dimensions(shape), view[end:], "F" if fortran else "C")
    raise MalformedBodyError("The .npy header is invalid; save the latent with numpy.save.")


def read_raw(name: str, data: Buffer, shape: tuple[int, ...], dtype: str) -> RawTensor:
    """Read little-endian elements in C order; `dtype` is float16, bfloat16 or float32.

    Raises:
        MalformedBodyError: the number of bytes does not match.
        UnsupportedMediaTypeError: it does not match, and the data looks like a pickle.
        InvalidLatentError, InvalidCaptionError: the dtype or the number of dimensions is not supported.
    """
    try:
        return RawTensor(name, plain_dtype(name, dtype), shape, data)
    except MalformedBodyError:
        reject_pickle(data)  # not earlier, as raw elements may begin with any bytes
        raise


def read_base64(name: str, value: Any) -> RawTensor:
    """Read a tensor in JSON: `{"data": base64, "shape": [...], "dtype": "float32"}`.

    Raises:
        MalformedBodyError: the object or its base64 is invalid.
        UnsupportedMediaTypeError, InvalidLatentError, InvalidCaptionError: as `read_raw`.
    """
    match value:
        case {"data": str() | memoryview() as text, "shape": list(shape), "dtype": str(dtype)} if len(value) == 3:
            try:
                data = decode_base64(text)
            except ValueError:
                raise MalformedBodyError(f"The data of {name} is not valid base64.") from None
            return read_raw(name, data, _dimensions(shape), dtype)
    raise MalformedBodyError(f"Send {name} as an object with exactly data (base64), shape (a list) and dtype.")


def numbers_tensor(name: str, shape: tuple[int, ...], value: object) -> RawTensor:
    """Read a float32 tensor from a list of numbers that `parse_json` returned, nested or not, in C order.

    Raises:
        MalformedBodyError: the list is invalid, or the number of numbers does not match the shape.
        InvalidLatentError, InvalidCaptionError: the number of dimensions is not supported.
    """
    check_rank(name, shape)
    numbers = decode_numbers(value)
    if min(shape) < 0 or math.prod(shape) != len(numbers):
        raise MalformedBodyError(
            f"The {name} has {count_of(len(numbers), 'number')}, which does not match its shape {quote(shape)}; "
            "send every element and nothing else."
        )
    return RawTensor(name, "float32", shape, numbers.data.cast("B"))


def reject_pickle(data: Buffer) -> None:
    """Reject files of torch.save, pickle and zip writers, because opening a pickle runs code.

    Raises:
        UnsupportedMediaTypeError: `data` begins like one of them.
    """
    head = bytes(data[:4])
    # A pickle's third byte is its first opcode; in a safetensors header length it is 0.
    pickled = len(head) > 2 and head[0] == 0x80 and 1 <= head[1] <= 5 and head[2] != 0
    if pickled or head == b"PK\x03\x04":
        raise unsupported("Pickles and zip archives, such as files of torch.save, are never opened")


def plain_dtype(name: str, dtype: str) -> str:
    """Return `dtype` if it is float16, bfloat16 or float32; otherwise raise the error for the tensor `name`."""
    return _dtype(name, dtype, PLAIN_DTYPES)


def _dtype(name: str, code: object, known: dict[str, str]) -> str:
    """Return the dtype for a format's `code`; raise the error for the tensor `name` if it is not among `known`."""
    if isinstance(code, str) and code in known:
        return known[code]
    raise invalid(name, f"has dtype {quote(code)}; send it as little-endian {one_of(known.values())}")


def _dimensions(shape: Sequence[object]) -> tuple[int, ...]:
    """Return `shape` as integers, or raise MalformedBodyError."""
    if not all(type(size) is int for size in shape):
        raise MalformedBodyError("The shape of a tensor must be a list of integers, such as [16, 64, 64].")
    return tuple(shape)  # type: ignore[arg-type]
