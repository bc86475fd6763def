"""Heads of decode requests: whatever they show to be wrong is rejected without the body."""

from __future__ import annotations

import pytest

from engines.errors import PidError
from server.body.detection import UNSPECIFIC_TYPES
from server.body.head import DecodeHead, read_head
from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.errors import (
    BodyTooLargeError,
    InvalidLatentError,
    InvalidOptionError,
    MalformedBodyError,
    NotAcceptableError,
    UnsupportedMediaTypeError,
)
from tests.server.body.bodies import FORM_TYPE, LIMITS

ELEMENTS = [("shape", "4,8,8"), ("dtype", "float32")]


def head(media_type: str = NPY, *headers: tuple[str, str], query=()) -> DecodeHead:
    return read_head([("content-type", media_type), *headers], list(query), LIMITS)


def rejection(*arguments, query=()) -> PidError:
    with pytest.raises(PidError) as raised:
        head(*arguments, query=query)
    return raised.value


@pytest.mark.parametrize("media_type", [SAFETENSORS, NPY, JSON, FORM_TYPE])
@pytest.mark.parametrize(
    "query", [[("steps", "9")], [("x", "1")], [("seed", "1"), ("seed", "2")], [("deadline_ms", "0")]]
)
def test_an_invalid_option_in_the_query_is_rejected(media_type, query):
    assert isinstance(rejection(media_type, query=query), InvalidOptionError)


def test_a_deadline_header_is_an_option():
    assert head(NPY, ("x-deadline-ms", "5"), ("x-deadline-ms", "5")).options.deadline_ms == 5
    for headers in ([("x-deadline-ms", "soon")], [("x-deadline-ms", "5"), ("x-deadline-ms", "6")]):
        assert isinstance(rejection(NPY, *headers), InvalidOptionError)
    assert isinstance(rejection(NPY, ("x-deadline-ms", "5"), query=[("deadline_ms", "6")]), InvalidOptionError)


def test_a_request_has_exactly_one_supported_media_type():
    assert isinstance(rejection("text/plain"), UnsupportedMediaTypeError)
    assert isinstance(rejection(f"{NPY}, {JSON}"), UnsupportedMediaTypeError)
    assert "more than one" in str(rejection(NPY, ("content-type", NPY)))


@pytest.mark.parametrize("codings", [["gzip"], ["identity", "gzip"], ["gzip, identity"], [""]])
def test_a_content_encoding_other_than_identity_is_rejected(codings):
    headers = [("content-encoding", coding) for coding in codings]
    assert isinstance(rejection(NPY, *headers), UnsupportedMediaTypeError)


def test_the_content_encoding_identity_is_accepted():
    assert head(NPY, ("content-encoding", "Identity"))


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=é", f"; boundary={'b' * 71}"])
def test_a_form_without_a_valid_boundary_is_rejected(boundary):
    assert isinstance(rejection(f"{FORM}{boundary}"), MalformedBodyError)


@pytest.mark.parametrize("length", [LIMITS.max_body_bytes + 1, "99999999999999999999"])
def test_a_body_that_is_declared_too_large_is_rejected(length):
    assert isinstance(rejection(NPY, ("content-length", str(length))), BodyTooLargeError)
    assert head(NPY, ("content-length", str(LIMITS.max_body_bytes))).content_length == LIMITS.max_body_bytes


@pytest.mark.parametrize("length", ["", "-1", "+5", "5.0", "0x5", "five", "5 ", "5, 5", "٥", "1" * 5000])
def test_an_invalid_content_length_is_rejected(length):
    assert isinstance(rejection(NPY, ("content-length", length)), MalformedBodyError)
    assert isinstance(rejection(NPY, ("content-length", "5"), ("content-length", "5")), MalformedBodyError)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (ELEMENTS[:1], InvalidOptionError),
        (ELEMENTS[1:], InvalidOptionError),
        ([*ELEMENTS, ("shape", "4,8,12")], InvalidOptionError),
        ([("shape", "4x8x8"), ELEMENTS[1]], InvalidOptionError),
        ([ELEMENTS[0], ("dtype", "float64")], InvalidLatentError),
        ([("shape", "4,9,8"), ELEMENTS[1]], InvalidLatentError),
        ([("shape", "4,4,8,8"), ELEMENTS[1]], InvalidLatentError),
        ([("shape", "8,8"), ELEMENTS[1]], InvalidLatentError),
        ([("shape", "2,4,-8,-12"), ELEMENTS[1]], InvalidLatentError),
        ([("shape", f"4,{2**24},{2**24}"), ELEMENTS[1]], InvalidLatentError),
    ],
)
@pytest.mark.parametrize("media_type", UNSPECIFIC_TYPES)
def test_raw_elements_need_a_supported_shape_and_dtype(query, error, media_type):
    assert isinstance(rejection(media_type, query=query), error)


def test_a_content_length_that_contradicts_the_shape_is_rejected():
    assert head(RAW, ("content-length", "1024"), query=ELEMENTS)
    assert isinstance(rejection(RAW, ("content-length", "1020"), query=ELEMENTS), MalformedBodyError)


@pytest.mark.parametrize("media_type", UNSPECIFIC_TYPES)
def test_a_body_of_undeclared_format_cannot_add_options(media_type):
    assert head(media_type).is_final
    assert isinstance(rejection(media_type, query=[("steps", "9")]), InvalidOptionError)
    assert isinstance(rejection(media_type, ("accept", "text/html")), NotAcceptableError)


def test_shape_and_dtype_of_a_form_may_be_in_its_fields():
    assert head(FORM_TYPE, query=ELEMENTS[:1]).layout == ELEMENTS[:1]
    assert isinstance(rejection(NPY, query=ELEMENTS), InvalidOptionError)


@pytest.mark.parametrize("accepts", [["text/html"], ["image/png;q=0"], ["text/html", "image/gif"]])
def test_an_accept_header_that_the_body_cannot_satisfy_is_rejected(accepts):
    headers = [("accept", accept) for accept in accepts]
    for media_type in (SAFETENSORS, NPY):
        assert isinstance(rejection(media_type, *headers), NotAcceptableError)
        assert head(media_type, *headers, query=[("format", "png")])
    for media_type in (JSON, FORM_TYPE):  # the body may have the option `format`
        assert head(media_type, *headers).accept == ", ".join(accepts)


def test_multipart_mixed_is_acceptable_as_the_body_may_have_a_batch():
    assert head(NPY, ("accept", "multipart/mixed"))


def test_all_accept_headers_count():
    assert head(NPY, ("accept", "text/html"), ("accept", "image/webp")).accept == "text/html, image/webp"
