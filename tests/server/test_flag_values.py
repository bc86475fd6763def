"""Readers of flag values."""

from __future__ import annotations

import pytest

from server.flag_values import read_origins


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("*", ("*",)),
        ("https://example.com", ("https://example.com",)),
        ("https://a.example, http://localhost:3000", ("https://a.example", "http://localhost:3000")),
        ("HTTPS://Example.com:443", ("https://example.com",)),  # browsers send it so
        ("http://example.com:443", ("http://example.com:443",)),
        ("http://[::1]:3000", ("http://[::1]:3000",)),
        ("chrome-extension://abcdef", ("chrome-extension://abcdef",)),
    ],
)
def test_origins_are_read_as_browsers_send_them(text: str, origins: tuple[str, ...]):
    assert read_origins(text) == origins


@pytest.mark.parametrize(
    "text",
    [
        *("", "example.com", "https://example.com/", "https://example.com/app", "https://*.example.com", "https://"),
        *("https://a.example,", "https://user@example.com", "https://example.com?x", "http://example.com:port"),
    ],
)
def test_what_no_browser_sends_is_rejected(text: str):
    with pytest.raises(ValueError, match="should be origins such as"):
        read_origins(text)


def test_an_asterisk_excludes_other_origins():
    with pytest.raises(ValueError, match="either"):
        read_origins("*,https://example.com")
