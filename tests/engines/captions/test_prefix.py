from __future__ import annotations

from pathlib import Path

import pytest

from engines.captions.prefix import MAX_BYTES, read_prefix
from engines.errors import ConfigError


@pytest.mark.parametrize(
    "text", ["one line", "with a newline\n", "\r\n and \r, kept ", " \t", "Grüße 🙂 \u2028", "x" * MAX_BYTES]
)
def test_the_text_is_unchanged(tmp_path: Path, text: str):
    (tmp_path / "prefix.txt").write_bytes(text.encode())
    assert read_prefix(tmp_path / "prefix.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"x" * (MAX_BYTES + 1), "more than 65,536 bytes"),
        (b"ab\xff", "is not UTF-8: invalid byte at offset 2"),
        (b"\xef\xbb\xbfab", "byte order mark"),
        ("ab".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_other_content_is_rejected(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "prefix.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prefix(tmp_path / "prefix.txt")


@pytest.mark.parametrize("path", ["missing.txt", "."])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, path: str):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prefix(tmp_path / path)
