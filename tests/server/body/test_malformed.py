"""Malformed bodies: every one is rejected with a message, and none costs much time or memory."""

from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import PidError
from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.errors import InvalidOptionError, MalformedBodyError
from tests.server.body.bodies import (
    BOUNDARY,
    CELLS,
    DECODER,
    DTYPES,
    ENTRY,
    FORM_TYPE,
    LATENT,
    LIMITS,
    ONE,
    VALID,
    file_part,
    form,
    json_body,
    npy,
    npy_header,
    packed,
    parse_request,
    raw,
    raw_query,
    rejected,
    safetensors_header,
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x02",
        bytes(8),
        (2**63).to_bytes(8, "little"),
        safetensors_header({"latent": ENTRY}, CELLS)[:-1],
        safetensors_header({"latent": ENTRY}, CELLS + b"\0"),
        safetensors_header({"latent": ENTRY})[:20],
        safetensors_header("[]"),
        safetensors_header("nonsense"),
        safetensors_header('{"latent": 1, "latent": 2}'),
        safetensors_header("[" * 60_000),
        safetensors_header('{"latent":' + "[" * 60_000),
        safetensors_header({"__metadata__": {}}, b"x"),
        safetensors_header({"latent": 1}),
        safetensors_header({"latent": {}}),
        safetensors_header({"latent": ENTRY | {"shape": 4}}, CELLS),
        safetensors_header({"latent": ENTRY | {"shape": [4, 8, 8.0]}}, CELLS),
        safetensors_header({"latent": ENTRY | {"shape": [4, 8, True]}}, CELLS),
        safetensors_header({"latent": ENTRY | {"shape": [4, -8, -8]}}, CELLS),
        safetensors_header({"latent": ENTRY | {"shape": [4, 8, 9]}}, CELLS),
        safetensors_header({"latent": ENTRY | {"data_offsets": [0, 1028]}}, CELLS),
        safetensors_header({"latent": ENTRY | {"data_offsets": [-1024, 0]}}, CELLS),
        safetensors_header({"latent": ENTRY | {"data_offsets": [4, 1028]}}, CELLS + bytes(4)),
        safetensors_header({"latent": ENTRY | {"data_offsets": [0, 10**400]}}, CELLS),
        safetensors_header({"latent": ENTRY, "caption": ENTRY | {"shape": [1, 1, 256]}}, CELLS),  # overlapping
    ],
)
def test_malformed_safetensors_are_rejected(body):
    rejected(MalformedBodyError, SAFETENSORS, body)


NPY_FIELDS = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8, 8), }"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x09\x00" + npy(ONE.numpy())[8:],
        npy(ONE.numpy())[:-1],
        npy(ONE.numpy()) + b"\0",
        npy(ONE.numpy())[:40],
        npy_header(NPY_FIELDS.replace("False", "0"), CELLS),
        npy_header(NPY_FIELDS.replace("(4, 8, 8)", "[4, 8, 8]"), CELLS),
        npy_header(NPY_FIELDS.replace("8, 8", "8, 8.0"), CELLS),
        npy_header(NPY_FIELDS.replace("8, 8", "-8, -8"), CELLS),
        npy_header(NPY_FIELDS.replace("8, 8", "8, 0x" + "f" * 900), CELLS),
        npy_header(NPY_FIELDS.replace("(4", "(__import__('os')"), CELLS),
        npy_header("(" * 1000, CELLS),
        npy_header("-" * 1000 + "1", CELLS),
        npy_header("[" * 90 + "]" * 90, CELLS),
        npy_header("{[]: 1}", CELLS),
        npy_header("\0", CELLS),
        npy_header("", CELLS),
        npy_header(NPY_FIELDS.ljust(2000), CELLS),
    ],
)
def test_a_malformed_npy_file_is_rejected(body):
    rejected(MalformedBodyError, NPY, body)


GOOD = packed(ONE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"1",
        b"\xff\xfe{}",
        json_body(latent=GOOD)[:-1],
        json_body(latent=GOOD) + b"}",
        json.dumps({"latent": GOOD}).encode("utf-16"),
        b'{"sigma": NaN}',
        b'{"sigma": -Infinity}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"seed": 1, "seed": 1}',
        b'{"latent": {"data": "", "data": ""}}',
        b"[" * 50_000,
        b"[" * 500_000,
        b'{"a":' * 200_000,
        b'{"latent": [' + b"0," * 200_000 + b"0]}",
        json_body(latent="AAAA"),
        json_body(latent=[1.0]),
        json_body(latent=None),
        json_body(latent={"data": "AAAA"}),
        json_body(latent=GOOD | {"extra": 1}),
        json_body(latent=GOOD | {"data": "AAA"}),
        json_body(latent=GOOD | {"data": "é€"}),
        json_body(latent=GOOD | {"data": GOOD["data"] + "\t"}),
        json_body(latent=GOOD | {"data": GOOD["data"][4:]}),
        json_body(latent=GOOD | {"shape": [4, 8, "8"]}),
        json_body(latent=GOOD | {"shape": "4,8,8"}),
        json_body(latent=GOOD | {"shape": [4, 8, 10**4000]}),
        json_body(latent=GOOD | {"shape": [4, -8, -8]}),
        json_body(latent=GOOD | {"dtype": 32}),
    ],
)
def test_malformed_json_is_rejected(body):
    rejected(MalformedBodyError, JSON, body)


LATENT_PART = file_part(npy(LATENT.numpy()))


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (FORM, form(LATENT_PART)),
        (f"{FORM}; boundary=", form(LATENT_PART)),
        (f"{FORM}; boundary=é", form(LATENT_PART)),
        (f"{FORM}; boundary=other", form(LATENT_PART)),
        (f"{FORM}; boundary={'b' * 10_000}", form(LATENT_PART)),
        (FORM_TYPE, b""),
        (FORM_TYPE, form(LATENT_PART)[:-4]),
        (FORM_TYPE, form(LATENT_PART)[:60]),
        (FORM_TYPE, form(LATENT_PART, LATENT_PART)),
        (FORM_TYPE, form(LATENT_PART, *[('name="sigma"', b"0")] * 272)),
        (FORM_TYPE, form(*[("A: b", b"")] * 16)),
        (FORM_TYPE, f"--{BOUNDARY}\r\n".encode() * 30_000),
        (FORM_TYPE, form(LATENT_PART).replace(b"--\r\n", b" " * 100_000)),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\n' + "A: b\r\n" * 20 + "C: d", b"0"))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\nA: ' + "b" * 5000, b"0"))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"', b"0" * 1000))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"', b"\xff"))),
        (FORM_TYPE, form(LATENT_PART, ("noname", b"0"))),
        (FORM_TYPE, form(LATENT_PART).replace(b"form-data", b"attachment")),
        (FORM_TYPE, form(LATENT_PART).replace(b"Content-Disposition", b"Content-Position")),
        (FORM_TYPE, form(LATENT_PART).replace(f"{BOUNDARY}\r\n".encode(), f"{BOUNDARY} \r\n".encode())),
        (FORM_TYPE, form(LATENT_PART).replace(f"{BOUNDARY}\r\n".encode(), f"{BOUNDARY}x\r\n".encode())),
        (FORM_TYPE, form(LATENT_PART).replace(f"{BOUNDARY}\r\n".encode(), f"{BOUNDARY}\n".encode())),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\nA: b\r\na: c', b"0"))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\nA : b', b"0"))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\n folded', b"0"))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\nA: b\rc', b"0"))),
        (FORM_TYPE, form(LATENT_PART, ('name="sigma"\r\nno colon', b"0"))),
        (FORM_TYPE, f"--{BOUNDARY}\r\n\r\n0\r\n--{BOUNDARY}--".encode()),
    ],
)
def test_a_malformed_form_is_rejected(content_type, body):
    rejected(MalformedBodyError, content_type, body)


@pytest.mark.parametrize("shape", ["2,4,8,8", "4,8,12", "3,4,8,12"])
def test_raw_elements_that_do_not_match_their_shape_are_rejected(shape):
    rejected(MalformedBodyError, RAW, raw(LATENT), [("shape", shape), ("dtype", "float32")])


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ([("shape", "2,4,8,12")], "option dtype"),
        ([("dtype", "float32")], "option shape"),
        ([*raw_query(LATENT), ("dtype", "float16")], "option dtype"),
        ([("shape", "2x4x8x12"), ("dtype", "float32")], "'2x4x8x12'"),
        ([("shape", ""), ("dtype", "float32")], "''"),
        ([("shape", "9" * 10_000), ("dtype", "float32")], "'999"),
        ([*raw_query(LATENT), ("shpae", "1")], "Unknown option 'shpae'"),
    ],
)
def test_invalid_options_of_raw_elements_are_rejected(query, part):
    assert part in rejected(InvalidOptionError, RAW, raw(LATENT), query)


def test_shape_and_dtype_are_options_of_raw_elements_only():
    assert "Unknown option 'shape'" in rejected(InvalidOptionError, NPY, npy(ONE.numpy()), [("shape", "4,8,8")])


@pytest.mark.parametrize(
    ("content_type", "body", "query"),
    [
        (SAFETENSORS, (2**50).to_bytes(8, "little") + bytes(1000), []),
        (
            SAFETENSORS,
            safetensors_header({"latent": {"dtype": "F32", "shape": [4, 2**24, 2**24], "data_offsets": [0, 2**52]}}),
            [],
        ),
        (NPY, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1000), []),
        (NPY, npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (4, {2**24}, {2**24})}}"), []),
        (JSON, json_body(latent={"data": "", "shape": [4, 2**24, 2**24], "dtype": "float32"}), []),
        (JSON, b'{"latent":[' + b"[]," * 300_000 + b"[]]}", []),
    ],
)
def test_a_huge_claimed_size_allocates_no_memory(content_type, body, query):
    tracemalloc.start()
    try:
        rejected(MalformedBodyError, content_type, body, query)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body) + 200_000


def parse_or_reject(content_type: str | None, body: bytes, query: list[tuple[str, str]]) -> None:
    with contextlib.suppress(PidError):
        request = parse_request(content_type, body, query, LIMITS)
        assert request.latents.shape[1] == DECODER.channels
        assert torch.isfinite(request.latents).all()


@given(st.sampled_from([SAFETENSORS, NPY, RAW, JSON, FORM_TYPE, FORM]), st.binary(max_size=200))
def test_random_bytes_are_parsed_or_rejected(content_type, body):
    parse_or_reject(content_type, body, [])
    parse_or_reject(content_type, body, [("shape", "1,4,8,8"), ("dtype", "float16")])


@given(st.sampled_from(sorted(VALID)), st.data())
@settings(max_examples=300)
def test_truncated_and_altered_bodies_are_parsed_or_rejected(kind, data):
    content_type, body, query = VALID[kind]
    altered = bytearray(body[: data.draw(st.integers(0, len(body)))]) or bytearray(1)
    reach = data.draw(st.sampled_from([64, 400, len(altered)]))  # most changes go into the headers
    for place in data.draw(st.lists(st.integers(0, min(reach, len(altered)) - 1), max_size=4)):
        altered[place] ^= 1 << data.draw(st.integers(0, 7))
    parse_or_reject(content_type, bytes(altered), query)
    altered += body[len(altered) :]
    parse_or_reject(content_type, bytes(altered), query)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["latent", "caption", "sigma", "seed", "steps", "format", "metadata", "x"]),
        JSON_VALUES
        | st.fixed_dictionaries(
            {"data": JSON_VALUES, "shape": JSON_VALUES | st.lists(st.integers()), "dtype": st.sampled_from([*DTYPES])}
        ),
    )
)
def test_any_json_is_parsed_or_rejected(members):
    parse_or_reject(JSON, json_body(**members), [])
    parse_or_reject(JSON, json_body(**{"latent": GOOD} | members), [])
    parse_or_reject(SAFETENSORS, safetensors_header(members), [])
    parse_or_reject(SAFETENSORS, safetensors_header({"latent": ENTRY | members}, CELLS), [])


@given(st.lists(st.tuples(st.sampled_from(["shape", "dtype", "sigma", "seed"]) | st.text(), st.text())), st.text())
def test_any_query_and_content_type_are_parsed_or_rejected(query, content_type):
    parse_or_reject(RAW, raw(LATENT), query)
    parse_or_reject(content_type, raw(LATENT), query)
    parse_or_reject(f"{FORM}; {content_type}", form(LATENT_PART), query)
