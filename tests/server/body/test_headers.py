"""Headers that have the same meaning in every protocol; test_head.py has those that are rejected."""

from __future__ import annotations

import pytest

from engines.errors import PidError
from server.body.headers import read_headers
from tests.server.body.bodies import LIMITS


def test_headers_are_read_without_a_check_of_the_media_type():
    headers = read_headers(
        [
            ("content-type", "Tensor/Binary; Version=2"),
            ("content-length", "5"),
            ("accept", "image/png"),
            ("accept", "tensor/binary"),
            ("x-deadline-ms", "soon"),
            ("x-other", "1"),
        ],
        LIMITS,
    )
    assert (headers.media_type, headers.params) == ("tensor/binary", {"version": "2"})
    assert (headers.content_length, headers.accept) == (5, "image/png, tensor/binary")
    assert headers.deadline == [("deadline_ms", "soon")]


def test_all_headers_are_optional():
    headers = read_headers([], LIMITS)
    assert (headers.media_type, headers.params) == ("", {})
    assert (headers.content_length, headers.accept, headers.deadline) == (None, None, [])


@pytest.mark.parametrize(
    "header",
    [("content-encoding", "gzip"), ("content-length", str(LIMITS.max_body_bytes + 1)), ("content-length", "five")],
)
def test_a_body_that_no_protocol_can_read_is_rejected(header):
    with pytest.raises(PidError):
        read_headers([header], LIMITS)
