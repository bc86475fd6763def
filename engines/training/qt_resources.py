"""Binary Qt resource files (`.rcc`), in which GCompris ships its photos.

Layout, all numbers big-endian: a header (magic, version, offsets of the tree, the data and the names), then these three
parts. A node of the tree is 22 bytes since version 2; node 0 is the root.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_NODE = 22  # bytes
_COMPRESSED, _DIRECTORY, _COMPRESSED_ZSTD = 1, 2, 4  # flags of a node


def _files(content: bytes, node: int, folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield path and content of every uncompressed file below a node of the tree."""
    tree, data, names = struct.unpack_from(">3I", content, 8)
    start = tree + node * _NODE
    name, flags = struct.unpack_from(">IH", content, start)
    (length,) = struct.unpack_from(">H", content, names + name)
    text = names + name + 6  # after the length and a hash
    path = folder / content[text : text + 2 * length].decode("utf-16-be")
    if flags & _DIRECTORY:
        count, first = struct.unpack_from(">2I", content, start + 6)
        for child in range(first, first + count):
            yield from _files(content, child, path)
    elif not flags & (_COMPRESSED | _COMPRESSED_ZSTD):
        (offset,) = struct.unpack_from(">I", content, start + 10)  # after a country and a language
        (size,) = struct.unpack_from(">I", content, data + offset)
        yield path, content[data + offset + 4 : data + offset + 4 + size]


def unpack(archive: Path, folder: Path) -> None:
    """Write the uncompressed files of a resource file below a folder. Images are never compressed a second time."""
    content = archive.read_bytes()
    if content[:4] != b"qres" or struct.unpack_from(">I", content, 4)[0] < 2:
        raise SystemExit(f"{archive} is not a Qt resource file of version 2 or later.")
    for path, data in _files(content, 0, folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
