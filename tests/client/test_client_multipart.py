"""The client's parser of multipart bodies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pid_client.multipart import MultipartParser, Part

TYPE = 'multipart/mixed; boundary="frontier"'
contents = st.lists(st.binary(max_size=40) | st.sampled_from([b"\r\n--front", b"\r\n\r\n", b"--frontier", b"-"]))


def body(contents: list[bytes], with_length: bool) -> bytes:
    parts = b""
    for index, content in enumerate(contents):
        length = f"content-length: {len(content)}\r\n" if with_length else ""
        parts += f"--frontier\r\nX-Index: {index}\r\n{length}\r\n".encode() + content + b"\r\n"
    return parts + b"--frontier--\r\n"


def feed(parser: MultipartParser, data: bytes, cuts: list[int]) -> list[Part]:
    """Feed `data` in pieces that end at `cuts`."""
    ends = [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [part for begin, end in zip([0, *ends], ends, strict=False) for part in parser.feed(data[begin:end])]


@given(contents, st.booleans(), st.lists(st.integers(0, 2000), max_size=20))
def test_parts_do_not_depend_on_how_the_body_is_cut(contents: list[bytes], with_length: bool, cuts: list[int]):
    if not with_length:
        contents = [content for content in contents if b"\r\n--frontier" not in b"\r\n" + content]
    parser = MultipartParser(TYPE)
    parts = feed(parser, body(contents, with_length), cuts)
    assert [part.content for part in parts] == contents
    assert [part.headers["X-INDEX"] for part in parts] == [str(index) for index in range(len(contents))]
    assert parser.complete


def test_a_part_with_a_length_need_not_wait_for_the_next_one():
    parser = MultipartParser(TYPE)
    data = body([b"first", b"second"], with_length=True)
    received = [part.content for part in parser.feed(data[: data.index(b"first") + 5])]
    assert received == [b"first"]
    assert not parser.complete


def test_a_body_without_its_end_is_not_complete():
    parser = MultipartParser(TYPE)
    feed(parser, body([b"first"], with_length=True)[:-4], [])
    assert not parser.complete


@pytest.mark.parametrize("content_type", ["", "image/png", "multipart/mixed", "text/plain; boundary=frontier"])
def test_other_types_are_rejected(content_type: str):
    with pytest.raises(ValueError, match="not multipart with a boundary"):
        MultipartParser(content_type)
