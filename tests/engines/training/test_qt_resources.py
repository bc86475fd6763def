"""Unpacking of binary Qt resource files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from engines.training import qt_resources


def _archive() -> bytes:
    """Return a file of version 3 with photos/a.webp, photos/b.webp and the compressed file photos/notes."""
    texts = ("", "photos", "a.webp", "b.webp", "notes")
    names, name_at = b"", []
    for text in texts:
        name_at.append(len(names))
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
    data, data_at = b"", []
    for content in (b"first", b"second", b"zzz"):
        data_at.append(len(data))
        data += struct.pack(">I", len(content)) + content
    tree = struct.pack(">IHIIQ", name_at[0], 2, 1, 1, 0) + struct.pack(">IHIIQ", name_at[1], 2, 3, 2, 0)
    for i, flags in enumerate((0, 0, 1)):
        tree += struct.pack(">IHHHIQ", name_at[2 + i], flags, 0, 1, data_at[i], 0)
    header = 24
    offsets = struct.pack(">5I", 3, header, header + len(tree), header + len(tree) + len(data), 0)
    return b"qres" + offsets + tree + data + names


def test_uncompressed_files_are_written_with_their_folders(tmp_path: Path) -> None:
    (tmp_path / "photos.rcc").write_bytes(_archive())
    qt_resources.unpack(tmp_path / "photos.rcc", tmp_path / "out")
    files = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in tmp_path.glob("out/**/*.*")}
    assert files == {"photos/a.webp": b"first", "photos/b.webp": b"second"}
    assert not (tmp_path / "out" / "photos" / "notes").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and more", b"qres" + struct.pack(">5I", 1, 24, 24, 24, 0)])
def test_other_files_are_rejected_with_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photos.rcc").write_bytes(content)
    with pytest.raises(SystemExit, match=r"photos\.rcc is not a Qt resource file of version 2 or later\."):
        qt_resources.unpack(tmp_path / "photos.rcc", tmp_path / "out")
