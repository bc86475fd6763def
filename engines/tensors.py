"""Files read once into memory, and the tensors of safetensors files as views of that memory.

A memory-mapped file would change the tensors when it is overwritten, and end the process when it is truncated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 16 * 2**20  # bytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_file(path: Path) -> tuple[bytearray, str]:
    """Return the content of a file and its SHA-256 in hexadecimal, from a single pass over the file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        view, end = memoryview(content), 0
        while end < len(content) and (count := file.readinto(view[end : end + _CHUNK])):
            digest.update(view[end : end + count])
            end += count
        view.release()
    del content[end:]  # the file was truncated after it was opened
    return content, digest.hexdigest()


def parse_safetensors(content: bytearray) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU, as views of `content`.

    Raises:
        ValueError: The content is not a valid safetensors file.
    """
    length = int.from_bytes(content[:8], "little")
    data = 8 + length  # where the tensors begin
    if not 2 <= length <= len(content) - 8:
        raise ValueError("the header is truncated")
    header = json.loads(content[8:data])
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(content, data, name, entry) for name, entry in header.items()}


def _tensor(content: bytearray, data: int, name: str, entry: object) -> Tensor:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if code in _DTYPES:
            dtype, valid = _DTYPES[code], all(type(side) is int and side >= 0 for side in shape)
            if code == "F4" and valid:  # the file counts numbers, PyTorch pairs of them
                valid = bool(shape) and shape[-1] % 2 == 0
                shape = [*shape[:-1], shape[-1] // 2] if valid else shape
            count = math.prod(shape) if valid else -1
            if 0 <= begin <= end <= len(content) - data and end - begin == count * dtype.itemsize:
                flat = torch.frombuffer(content, dtype=dtype, count=count, offset=data + begin) if count else None
                return (torch.empty(0, dtype=dtype) if flat is None else flat).view(shape)
    raise ValueError(f"the entry of {name} is invalid")
