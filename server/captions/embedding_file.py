"""Files of caption embeddings, of which every byte is verified when they are read.

They are safetensors files with the bfloat16 tensor `caption` and, as metadata, the key of the embedding and the SHA-256
of its data. The key, the shape and the data determine all bytes, so a reader compares instead of parsing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SUFFIX = ".safetensors"
PARTIAL = ".partial"  # suffix while a file is being written
FORMAT = "pid-caption-1"  # part of the key; change it with the format, so that older files are not read


def embedding_key(identity: str, prompt: str) -> str:
    """Return the hexadecimal SHA-256 that names the embedding of a prompt by the text encoder with this identity."""
    fields = (FORMAT.encode(), identity.encode(), prompt.encode(errors="surrogatepass"))
    return hashlib.sha256(b"\0".join(fields)).hexdigest()


def file_bytes(shape: tuple[int, int]) -> int:
    """Return the size of the file of an embedding with this shape."""
    return len(_header("0" * 64, "0" * 64, shape)) + _data_bytes(shape)


def read_embedding(path: Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    """Return the embedding in a file, or None if the file is damaged or has another key, shape or dtype.

    Raises:
        OSError: The file is missing or cannot be read.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != file_bytes(shape):
            return None
        data = bytearray(_data_bytes(shape))
        header = file.read(file_bytes(shape) - len(data))
        file.readinto(data)
    if header != _header(key, hashlib.sha256(data).hexdigest(), shape):
        return None
    return torch.frombuffer(data, dtype=torch.bfloat16).view(shape)


def write_embedding(directory: Path, key: str, embedding: Tensor) -> None:
    """Write the file of an embedding [tokens, width], bfloat16 on the CPU, under a temporary name and rename it.

    It is not flushed to the disk: after a power failure, a file with missing data is found to be damaged.

    Raises:
        OSError: The file cannot be written.
    """
    data = embedding.detach().contiguous().view(torch.uint8).numpy().data
    tokens, width = embedding.shape
    descriptor, partial = tempfile.mkstemp(prefix=f"{key}.", suffix=PARTIAL, dir=directory)
    try:
        with open(descriptor, "wb") as file:
            file.write(_header(key, hashlib.sha256(data).hexdigest(), (tokens, width)))
            file.write(data)
        os.replace(partial, directory / f"{key}{SUFFIX}")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _data_bytes(shape: tuple[int, int]) -> int:
    return math.prod(shape) * torch.bfloat16.itemsize


def _header(key: str, digest: str, shape: tuple[int, int]) -> bytes:
    """Return the bytes before the data. Their number depends on the shape only."""
    header = {
        "__metadata__": {"key": key, "sha256": digest},
        "caption": {"dtype": "BF16", "shape": shape, "data_offsets": [0, _data_bytes(shape)]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
