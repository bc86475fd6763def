"""Content negotiation: the option decides the format, the Accept header the format and the container."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.body.negotiation import CONTAINER_TYPES, negotiate
from server.errors import NotAcceptableError
from server.images.formats import IMAGE_FORMATS

BROWSER = "text/html, application/xml;q=0.9, image/webp, */*;q=0.8"
AXIOS = "application/json, text/plain, */*"


@pytest.mark.parametrize(
    ("accept", "image"),
    [
        (None, "png"),
        ("", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("image/webp", "webp"),
        ("IMAGE/JPEG", "jpeg"),
        ("image/jpg", "jpeg"),
        ("image/webp, image/jpeg", "webp"),
        ("image/webp;q=0.5, image/jpeg;q=0.8", "jpeg"),
        ("image/png;q=0.1, image/*;q=0.9", "webp"),
        ("image/png;q=0, */*", "webp"),
        ("image/png;q=0, image/webp;q=0, */*;q=0.1", "jpeg"),
        (BROWSER, "webp"),
        (AXIOS, "png"),
        ("application/problem+json", "png"),
        ("image/webp;q=2, image/jpeg", "jpeg"),
        ("image/webp;q=nan, image/jpeg", "jpeg"),
        ("image/webp;q=x, image/jpeg", "jpeg"),
        ('text/plain;a="b, image/webp", image/jpeg', "jpeg"),
        (",,;;,image/jpeg", "jpeg"),
        ("application/x-npy", "npy"),
        ("application/x-npy, image/*;q=0.9", "npy"),
    ],
)
def test_the_accept_header_chooses_the_format(accept, image):
    assert negotiate(None, accept, batch=False) == (image, "none")
    assert negotiate(None, accept, batch=True) == (image, "multipart")


@pytest.mark.parametrize(
    ("accept", "one", "batch"),
    [
        ("multipart/mixed", "multipart", "multipart"),
        ("application/json", "json", "json"),
        ("application/zip", "zip", "zip"),
        ("application/*", "json", "json"),
        ("image/png, application/json", "none", "multipart"),
        ("image/png;q=0.5, application/json", "json", "json"),
        ("application/json;q=0.5, application/zip", "zip", "zip"),
        ("multipart/mixed;q=0.1, application/zip;q=0.2", "zip", "zip"),
        ("multipart/mixed;q=0, */*", "none", "multipart"),
        ("image/*;q=0, */*", "multipart", "multipart"),
    ],
)
def test_the_accept_header_chooses_the_container(accept, one, batch):
    assert negotiate(None, accept, batch=False) == ("png", one)
    assert negotiate(None, accept, batch=True) == ("png", batch)


def test_images_in_a_container_have_the_accepted_format():
    assert negotiate(None, "application/json, image/webp;q=0.5", batch=False) == ("webp", "json")
    assert negotiate("jpeg", "application/json, image/webp;q=0.5", batch=False) == ("jpeg", "json")


def test_the_option_overrides_the_accept_header():
    assert negotiate("webp", "image/jpeg", batch=False) == ("webp", "none")
    assert negotiate("png", "text/html", batch=False) == ("png", "none")
    assert negotiate("png", "text/html", batch=True) == ("png", "multipart")


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "accept",
    ["text/html", "image/gif", "application/octet-stream", "image/png;q=0", "*/*;q=0", "image/*;q=0.0, text/*"],
)
def test_an_accept_header_without_a_supported_media_type_is_rejected(accept, batch):
    with pytest.raises(NotAcceptableError, match=r"image/png, .*zip, text/event-stream or multi") as raised:
        negotiate(None, accept, batch)
    assert raised.value.status == 406


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    ("accept", "representation"),
    [
        (None, ("png", "events")),
        ("*/*", ("png", "events")),
        ("text/*", ("png", "events")),
        ("image/webp", ("webp", "replace")),
        ("image/webp, */*;q=0.1", ("webp", "replace")),
        ("text/event-stream, image/webp;q=0.5", ("webp", "events")),
        ("multipart/x-mixed-replace", ("png", "replace")),
        ("application/json, text/event-stream;q=0.1", ("png", "events")),
    ],
)
def test_previews_have_containers_of_their_own(accept, representation, batch):
    assert negotiate(None, accept, batch, previews=True) == representation


@pytest.mark.parametrize("batch", [False, True])
def test_containers_with_previews_can_be_chosen_by_name_only(batch):
    assert negotiate(None, "text/event-stream", batch).container == "events"
    assert negotiate(None, "multipart/x-mixed-replace, */*;q=0.1", batch).container == "replace"
    assert negotiate(None, "multipart/*", batch).container == "multipart"
    with pytest.raises(NotAcceptableError, match=r"accept text/event-stream or multipart/x-mixed-replace\."):
        negotiate("png", "application/json", batch, previews=True)


@given(st.text(), st.booleans(), st.booleans())
def test_any_accept_header_is_negotiated_or_rejected(accept, batch, previews):
    with contextlib.suppress(NotAcceptableError):
        image_format, container = negotiate(None, accept, batch, previews)
        assert image_format in IMAGE_FORMATS
        assert container == "none" or container in CONTAINER_TYPES
