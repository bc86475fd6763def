"""Bodies and files of forms whose format the client does not declare."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from server.body.detection import UNSPECIFIC_TYPES, detect_format
from server.body.media import BODY_TYPES, JSON, NPY, SAFETENSORS
from server.errors import MalformedBodyError, UnsupportedMediaTypeError
from tests.server.body.bodies import (
    CAPTION,
    FORM_TYPE,
    LATENT,
    form,
    json_body,
    npy,
    packed,
    parse_request,
    raw,
    raw_query,
    rejected,
    safetensors_header,
)

TYPES = [None, *UNSPECIFIC_TYPES]
FILES = {
    "npy": npy(LATENT.numpy()),
    "npy 3": npy(np.asfortranarray(LATENT.numpy()), (3, 0)),
    "safetensors": save_safetensors({"latent": LATENT}),
    "with a caption": save_safetensors({"latent": LATENT, "caption": CAPTION}, {"workflow": "x" * 30_000}),
}


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("buffer", [bytes, bytearray])
def test_a_file_is_recognised(content_type, kind, buffer):
    request = parse_request(content_type, buffer(FILES[kind]), [("seed", "7")])
    assert torch.equal(request.latents, LATENT)
    assert (request.captions is not None) == (kind == "with a caption")
    assert request.options.seed == 7


@pytest.mark.parametrize("content_type", TYPES)
def test_elements_with_shape_and_dtype_in_the_query_are_raw(content_type):
    assert torch.equal(parse_request(content_type, raw(LATENT), raw_query(LATENT)).latents, LATENT)
    data = FILES["npy"][:8].ljust(1024, b"\0")  # with a shape, nothing is detected
    assert raw(parse_request(content_type, data, raw_query(torch.zeros(4, 8, 8))).latents) == data


@pytest.mark.parametrize("declared", ["", "\r\nContent-Type: application/octet-stream"])
@pytest.mark.parametrize("name", ["", '; filename="latent"', '; filename="latent.bin"'])
def test_a_file_of_a_form_is_recognised(declared, name):
    for data in FILES.values():
        body = form((f'name="latent"{name}{declared}', data))
        assert torch.equal(parse_request(FORM_TYPE, body, []).latents, LATENT)
    body = form((f'name="latent"{name}{declared}', raw(LATENT)))
    assert torch.equal(parse_request(FORM_TYPE, body, raw_query(LATENT)).latents, LATENT)


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUM",
        b"{",
        b"latent=1",
        raw(LATENT),
        bytes(8) + b"{",
        (1).to_bytes(8, "little") + b"{",
        (2**16).to_bytes(8, "little") + b"{" * 2**16,
        (2**63).to_bytes(8, "little") + b"{",
        safetensors_header("[]"),
        json_body(latent=packed(LATENT)),
    ],
)
def test_other_bodies_are_rejected_with_the_supported_types(content_type, body):
    message = rejected(UnsupportedMediaTypeError, content_type, body)
    assert all(kind in message for kind in BODY_TYPES)
    assert "raw elements need the options shape and dtype" in message
    assert message == rejected(UnsupportedMediaTypeError, FORM_TYPE, form(('name="latent"', body)))


@pytest.mark.parametrize("content_type", TYPES)
def test_pickles_of_undeclared_format_are_never_opened(content_type):
    for body in (pickle.dumps(LATENT.numpy(), protocol=2), pickle.dumps({"{": LATENT.numpy()}), b"PK\x03\x04{{{{{{{"):
        assert "never opened" in rejected(UnsupportedMediaTypeError, content_type, body)


@pytest.mark.parametrize("length", [9, 20, 200])
def test_a_truncated_file_is_recognised_and_malformed(length):
    for kind, media_type in (("npy", NPY), ("safetensors", SAFETENSORS)):
        assert detect_format(FILES[kind][:length]) == media_type
        rejected(MalformedBodyError, None, FILES[kind][:length])


def test_a_header_length_that_begins_like_a_pickle_is_recognised():
    entry = {"dtype": "F32", "shape": [4, 8, 8], "data_offsets": [0, 1024]}
    body = safetensors_header(json.dumps({"latent": entry}).ljust(0x280), bytes(1024))
    assert body[:2] == b"\x80\x02"
    assert detect_format(body) == SAFETENSORS


def test_a_declared_type_is_not_replaced_by_the_detected_one():
    rejected(MalformedBodyError, NPY, FILES["safetensors"])
    rejected(MalformedBodyError, JSON, FILES["npy"])
    rejected(UnsupportedMediaTypeError, "text/plain", FILES["npy"])
