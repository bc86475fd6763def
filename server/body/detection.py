"""Detection of the format of a body from its first bytes, for clients that do not declare it."""

from __future__ import annotations

from server.body import media
from server.body.quoting import one_of
from server.body.tensors import MAX_SAFETENSORS_HEADER, NPY_MAGIC, Buffer, reject_pickle
from server.errors import UnsupportedMediaTypeError

# Declared by clients for bodies of any format; the last one by curl. An empty type is missing.
UNSPECIFIC_TYPES = ("", media.RAW, "application/x-www-form-urlencoded")


def detect_format(data: Buffer) -> str:
    """Return the media type of a safetensors or .npy file, complete or not.

    Raises:
        UnsupportedMediaTypeError: `data` begins like neither of them.
    """
    reject_pickle(data)
    start = bytes(data[:9])
    if start.startswith(NPY_MAGIC):
        return media.NPY
    if start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= MAX_SAFETENSORS_HEADER:
        return media.SAFETENSORS
    raise UnsupportedMediaTypeError(
        "The body is neither a safetensors nor an .npy file, and raw elements need the options shape and dtype; "
        f"otherwise, set the Content-Type to {one_of(media.BODY_TYPES)}."
    )
