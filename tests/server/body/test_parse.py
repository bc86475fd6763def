"""Request bodies: every accepted form reads alike, and everything else is answered in one sentence."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from engines.errors import PidError
from engines.size import Size
from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.body.parse import parse_request, read_body
from server.errors import (
    BodyTooLargeError,
    InvalidCaptionError,
    InvalidLatentError,
    InvalidOptionError,
    MalformedBodyError,
    UnsupportedMediaTypeError,
)
from server.request import DecoderLimits

ACCEPTS = DecoderLimits(
    channels=4,
    latent_sizes=(Size(8, 8), Size(8, 12), Size(16, 16)),
    pixels_per_cell=32,
    caption_tokens=3,
    caption_width=5,
    max_batch=3,
    max_body=1 << 20,
)
LATENT = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)).bfloat16().half().float()
CAPTION = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
ONE = torch.zeros(4, 8, 8)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BOUNDARY = "----frontier7"
FORM_TYPE = f"{FORM}; boundary={BOUNDARY}"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def npy_header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1") + data


def safetensors_header(header: object, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def packed(tensor: torch.Tensor) -> dict[str, object]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"data": base64.b64encode(raw(tensor)).decode(), "shape": list(tensor.shape), "dtype": dtype}


def json_body(**members: object) -> bytes:
    return json.dumps(members).encode()


def form(*parts: tuple[str, bytes]) -> bytes:
    """Each part is its headers, without the name of the first one, and its data."""
    lines = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {headers}\r\n\r\n".encode() + data + b"\r\n"
        for headers, data in parts
    )
    return lines + f"--{BOUNDARY}--\r\n".encode()


def file_part(data: bytes, name: str = "latent.npy", content_type: str = RAW) -> tuple[str, bytes]:
    return f'name="latent"; filename="{name}"\r\nContent-Type: {content_type}', data


def raw_query(tensor: torch.Tensor) -> list[tuple[str, str]]:
    shape = ",".join(map(str, tensor.shape))
    return [("shape", shape), ("dtype", str(tensor.dtype).removeprefix("torch."))]


# One valid body of each kind: content type, body, query.
VALID = {
    "safetensors": (SAFETENSORS, save_safetensors({"latent": LATENT, "caption": CAPTION}), []),
    "npy": (NPY, npy(LATENT.numpy()), []),
    "raw": (RAW, raw(LATENT), raw_query(LATENT)),
    "json": (JSON, json_body(latent=packed(LATENT), sigma=0.5), []),
    "form": (FORM_TYPE, form(file_part(npy(LATENT.numpy())), ('name="sigma"', b"0.5")), []),
}


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_the_same_latent_in_every_body(kind, buffer):
    content_type, body, query = VALID[kind]
    request = parse_request(content_type, buffer(body), query, ACCEPTS)
    assert torch.equal(request.latents, LATENT)
    assert request.latents.dtype == torch.float32
    assert request.latents.is_contiguous()
    assert (request.captions is not None) == (kind == "safetensors")
    assert request.options.sigma == (0.5 if kind in ("json", "form") else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [True, False])
def test_dtypes_widen_exactly_and_a_single_latent_becomes_a_batch(dtype, batched):
    latent = (LATENT if batched else LATENT[0]).to(DTYPES[dtype])
    expected = latent.float().reshape(-1, 4, 8, 12)
    bodies = [
        (SAFETENSORS, save_safetensors({"latent": latent}), []),
        (RAW, raw(latent), raw_query(latent)),
        (JSON, json_body(latent=packed(latent)), []),
        (FORM_TYPE, form(file_part(save_safetensors({"latent": latent}), "a.safetensors")), []),
        (FORM_TYPE, form(file_part(raw(latent), "a"), *((f"name={n}", v.encode()) for n, v in raw_query(latent))), []),
    ]
    if dtype != "bfloat16":
        bodies += [(NPY, npy(latent.numpy(), version), []) for version in ((1, 0), (2, 0), (3, 0))]
        bodies += [(NPY, npy(np.asfortranarray(latent.numpy())), [])]
    for content_type, body, query in bodies:
        assert torch.equal(parse_request(content_type, body, query, ACCEPTS).latents, expected)


def test_options_come_from_the_query_json_and_forms_alike():
    query = [("steps", "2"), ("metadata", "true")]
    for content_type, body in [
        (JSON, json_body(latent=packed(LATENT), seed=7, steps=2)),
        (FORM_TYPE, form(file_part(npy(LATENT.numpy())), ('name="seed"', b"7"), ('name="steps"', b"2"))),
    ]:
        options = parse_request(content_type, body, query, ACCEPTS).options
        assert (options.seed, options.steps, options.metadata) == (7, 2, True)
        with pytest.raises(InvalidOptionError, match="steps once"):
            parse_request(content_type, body, [("steps", "3")], ACCEPTS)


def test_media_types_ignore_case_and_parameters():
    assert parse_request("Application/JSON; charset=UTF-8", json_body(latent=packed(LATENT)), [], ACCEPTS)


@pytest.mark.parametrize(
    "declared", [(f"Content-Type: {NPY}", "x"), (f"Content-Type: {RAW}", "x.npy"), ("A: b", "X.NPY")]
)
def test_a_form_file_is_known_by_its_type_or_its_name(declared):
    header, name = declared
    part = (f"name=latent; filename*=UTF-8''{name}\r\n{header}", npy(LATENT.numpy()))
    assert torch.equal(parse_request(FORM_TYPE, form(part), [], ACCEPTS).latents, LATENT)


def test_captions():
    def captions(caption: torch.Tensor) -> torch.Tensor | None:
        body = save_safetensors({"latent": LATENT, "caption": caption})
        alike = json_body(latent=packed(LATENT), caption=packed(caption))
        read = parse_request(SAFETENSORS, body, [], ACCEPTS).captions
        assert torch.equal(read, parse_request(JSON, alike, [], ACCEPTS).captions)
        return read

    assert torch.equal(captions(CAPTION), CAPTION)
    assert torch.equal(captions(CAPTION.half()), CAPTION.half().float())
    assert torch.equal(captions(CAPTION[0]), CAPTION[:1].expand(2, -1, -1))  # one for all


def refused(error: type[PidError], content_type: str | None, body: bytes, query=(), accepts=ACCEPTS) -> str:
    """The sentence with which the request is refused; it is short, of one line, and quotes no library."""
    with pytest.raises(error) as refusal:
        parse_request(content_type, body, list(query), accepts)
    assert type(refusal.value) is error
    sentence = str(refusal.value)
    assert len(sentence) < 320
    assert sentence.isprintable()
    assert sentence.endswith(".")
    assert not any(word in sentence for word in ("Traceback", "Error", "site-packages", ".py:"))
    return sentence


# ---------------------------------------------------------------- media types


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save(LATENT, file)
    return file.getvalue()


PICKLES = [torch_file(), *(pickle.dumps(LATENT.numpy(), protocol) for protocol in range(2, 6))]


@pytest.mark.parametrize(
    ("content_type", "part"),
    [
        (None, "The request names no Content-Type"),
        ("", "The request names no Content-Type"),
        ("image/png", "'image/png'"),
        ("application/x-pytorch", "'application/x-pytorch'"),
        ("application", "'application'"),
        ("x" * 100_000, "'xxx"),
    ],
)
def test_unknown_media_types(content_type, part):
    sentence = refused(UnsupportedMediaTypeError, content_type, b"")
    assert part in sentence
    assert all(kind in sentence for kind in (SAFETENSORS, NPY, RAW, JSON, FORM))


@pytest.mark.parametrize("body", PICKLES, ids=["torch", "2", "3", "4", "5"])
@pytest.mark.parametrize("content_type", [SAFETENSORS, NPY, RAW, JSON, FORM_TYPE, "application/x-pytorch"])
def test_pickles_are_never_opened(content_type, body):
    for query in [[], raw_query(LATENT)]:
        assert "never opened" in refused(UnsupportedMediaTypeError, content_type, body, query)
    assert "never opened" in refused(UnsupportedMediaTypeError, FORM_TYPE, form(file_part(body)))
    enclosed = packed(LATENT) | {"data": base64.b64encode(body).decode()}
    assert "never opened" in refused(UnsupportedMediaTypeError, JSON, json_body(latent=enclosed))


@pytest.mark.parametrize("start", [b"\x80\x02\x8a\x0a", b"PK\x03\x04"])
def test_raw_elements_of_the_right_size_may_begin_like_a_pickle(start):
    body = start + raw(LATENT)[4:]
    assert raw(parse_request(RAW, body, raw_query(LATENT), ACCEPTS).latents)[:4] == start


def test_a_safetensors_header_length_may_begin_like_a_pickle():
    header = json.dumps({"latent": {"dtype": "F32", "shape": [4, 8, 8], "data_offsets": [0, 1024]}}).ljust(0x280)
    body = safetensors_header(header, bytes(1024))
    assert body[:2] == b"\x80\x02"
    assert parse_request(SAFETENSORS, body, [], ACCEPTS).latents.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("name", ["latent.pt", "latent.PTH", "a/b.pkl", "latent.ckpt"])
def test_pickle_file_names_in_forms(name):
    part = file_part(npy(LATENT.numpy()), name, SAFETENSORS)
    assert "may be a pickle" in refused(UnsupportedMediaTypeError, FORM_TYPE, form(part))


@pytest.mark.parametrize("headers", ['name="latent"', 'name="latent"; filename="a.png"\r\nContent-Type: image/png'])
def test_form_files_of_unknown_kind(headers):
    refused(UnsupportedMediaTypeError, FORM_TYPE, form((headers, b"abc")))


# ---------------------------------------------------------------- malformed bodies

ENTRY = {"dtype": "F32", "shape": [4, 8, 8], "data_offsets": [0, 1024]}
CELLS = bytes(1024)


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
def test_malformed_safetensors(body):
    refused(MalformedBodyError, SAFETENSORS, body)


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
def test_malformed_npy(body):
    refused(MalformedBodyError, NPY, body)


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
        json_body(latent=GOOD | {"data": GOOD["data"] + "\n"}),
        json_body(latent=GOOD | {"data": GOOD["data"][4:]}),
        json_body(latent=GOOD | {"shape": [4, 8, "8"]}),
        json_body(latent=GOOD | {"shape": "4,8,8"}),
        json_body(latent=GOOD | {"shape": [4, 8, 10**4000]}),
        json_body(latent=GOOD | {"shape": [4, -8, -8]}),
        json_body(latent=GOOD | {"dtype": 32}),
    ],
)
def test_malformed_json(body):
    refused(MalformedBodyError, JSON, body)


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
        (FORM_TYPE, form(LATENT_PART, *[('name="sigma"', b"0")] * 16)),
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
    ],
)
def test_malformed_forms(content_type, body):
    refused(MalformedBodyError, content_type, body)


@pytest.mark.parametrize("shape", ["2,4,8,8", "2,4,-8,-12", "4,8,99999999999999999999", "-1,4,8,12"])
def test_raw_bytes_that_disagree_with_their_shape(shape):
    refused(MalformedBodyError, RAW, raw(LATENT), [("shape", shape), ("dtype", "float32")])


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ([], "option shape"),
        ([("shape", "2,4,8,12")], "option dtype"),
        ([("dtype", "float32")], "option shape"),
        ([*raw_query(LATENT), ("dtype", "float16")], "option dtype"),
        ([("shape", "2x4x8x12"), ("dtype", "float32")], "'2x4x8x12'"),
        ([("shape", ""), ("dtype", "float32")], "''"),
        ([("shape", "9" * 10_000), ("dtype", "float32")], "'999"),
        ([*raw_query(LATENT), ("shpae", "1")], "no option 'shpae'"),
    ],
)
def test_options_of_raw_bytes(query, part):
    assert part in refused(InvalidOptionError, RAW, raw(LATENT), query)


def test_shape_and_dtype_are_options_of_raw_bytes_alone():
    assert "no option 'shape'" in refused(InvalidOptionError, NPY, npy(ONE.numpy()), [("shape", "4,8,8")])


# ---------------------------------------------------------------- latents and captions


def with_value(value: float, dtype: torch.dtype) -> torch.Tensor:
    latent = LATENT.to(dtype, copy=True)
    latent[1, 2, 3, 4] = value
    return latent


@pytest.mark.parametrize(
    ("latent", "part"),
    [
        (torch.zeros(16, 8, 8), "16 channels; this decoder takes 4, as [4, h, w]"),
        (torch.zeros(8, 8, 4), "8 channels"),
        (torch.zeros(0, 8, 8), "0 channels"),
        (torch.zeros(0, 4, 8, 8), "batch of 0; send 1 to 3"),
        (torch.zeros(4, 4, 8, 8), "batch of 4; send 1 to 3"),
        (torch.zeros(4, 0, 8), "is 0x8"),
        (torch.zeros(4, 7, 8), "8x8 (for 256x256 pixels), 8x12 (for 256x384 pixels) or 16x16 (for 512x512 pixels)"),
        (torch.zeros(4, 12, 8), "is 12x8 (height x width)"),
        (torch.zeros(8, 8), "2 dimensions"),
        (torch.zeros(1, 1, 4, 8, 8), "5 dimensions"),
        (torch.zeros(()), "0 dimensions"),
        *(
            (torch.zeros(4, 8, 8).to(dtype), "send it as little-endian float16, bfloat16 or float32")
            for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn)
        ),
        *(
            (with_value(value, dtype), "NaN or infinity")
            for value in (float("nan"), float("inf"), -float("inf"))
            for dtype in DTYPES.values()
        ),
    ],
)
def test_latents_that_are_not_taken(latent, part):
    assert part in refused(InvalidLatentError, SAFETENSORS, save_safetensors({"latent": latent}))
    if latent.dtype in DTYPES.values():
        assert part in refused(InvalidLatentError, JSON, json_body(latent=packed(latent)))
        if latent.ndim:
            assert part in refused(InvalidLatentError, RAW, raw(latent), raw_query(latent))


def test_claims_of_nothing_may_be_huge():
    shapes = [[4, 0, 10**4000], [0, 4, 10**30, 10**30], [10**4000, 0, 8]]
    for shape in shapes:
        refused(InvalidLatentError, JSON, json_body(latent={"data": "", "shape": shape, "dtype": "float32"}))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 8, 8)),
        np.zeros((4, 8, 8), ">f4"),
        np.zeros((4, 8, 8), np.int64),
        np.zeros((4, 8, 8), np.complex64),
        np.zeros((4, 8, 8), "V2"),
        np.zeros((4, 8, 8), [("a", "<f4")]),
        np.full((4, 8, 8), None),
    ],
    ids=lambda array: array.dtype.str,
)
def test_npy_dtypes_that_are_not_taken(array):
    sentence = refused(InvalidLatentError, NPY, npy(array))
    assert "send it as little-endian float16 or float32" in sentence


@pytest.mark.parametrize("dtype", ["float64", "F32", "", "x" * 10_000])
def test_raw_dtypes_that_are_not_taken(dtype):
    refused(InvalidLatentError, RAW, raw(LATENT), [("shape", "2,4,8,12"), ("dtype", dtype)])
    refused(InvalidLatentError, JSON, json_body(latent=packed(LATENT) | {"dtype": dtype}))


def test_a_body_needs_a_latent_and_no_other_tensors():
    unknown = save_safetensors({"latents": LATENT, "noise": ONE})
    sentence = refused(InvalidLatentError, SAFETENSORS, unknown)
    assert "latents" in sentence
    assert "noise" in sentence
    assert "no latent" in refused(InvalidLatentError, SAFETENSORS, save_safetensors({"caption": CAPTION}))
    assert "no latent" in refused(InvalidLatentError, SAFETENSORS, save_safetensors({}))
    assert "no latent" in refused(InvalidLatentError, JSON, b"{}")
    assert "no field latent" in refused(InvalidLatentError, FORM_TYPE, form(('name="sigma"', b"0")))
    assert "no field latent" in refused(InvalidLatentError, FORM_TYPE, form())
    refused(InvalidLatentError, SAFETENSORS, safetensors_header({"x" * 60_000: ENTRY}, CELLS))


def test_metadata_of_a_safetensors_file_is_passed_over():
    metadata = {"workflow": ",[{" * 5000}
    assert parse_request(SAFETENSORS, save_safetensors({"latent": LATENT}, metadata), [], ACCEPTS)


@pytest.mark.parametrize(
    ("caption", "part"),
    [
        (torch.zeros(7, 5), "7 tokens of width 5; this decoder takes exactly 3 tokens"),
        (torch.zeros(0, 5), "0 tokens"),
        (torch.zeros(3, 4), "width 4"),
        (torch.zeros(1, 3, 5), "batch of 1; send 2, one for each latent"),
        (torch.zeros(3, 3, 5), "batch of 3"),
        (torch.zeros(0, 3, 5), "batch of 0"),
        (torch.zeros(5), "1 dimensions"),
        (torch.zeros(1, 2, 3, 5), "4 dimensions"),
        (torch.zeros(3, 5).long(), "dtype 'I64'"),
        (torch.full((3, 5), float("nan")), "NaN"),
        (torch.full((3, 5), float("inf")).half(), "infinity"),
    ],
)
def test_captions_that_are_not_taken(caption, part):
    body = save_safetensors({"latent": LATENT, "caption": caption})
    assert part in refused(InvalidCaptionError, SAFETENSORS, body)


def test_a_decoder_without_captions_takes_none():
    accepts = DecoderLimits(4, ((8, 12),), 32, caption_tokens=0, caption_width=0, max_batch=3, max_body=1 << 20)
    body = save_safetensors({"latent": LATENT, "caption": CAPTION})
    assert "leave it out" in refused(InvalidCaptionError, SAFETENSORS, body, accepts=accepts)
    assert parse_request(NPY, npy(LATENT.numpy()), [], accepts).captions is None


# ---------------------------------------------------------------- claims and fuzz


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
        (RAW, b"", [("shape", f"4,{2**24},{2**24}"), ("dtype", "float32")]),
        (JSON, json_body(latent={"data": "", "shape": [4, 2**24, 2**24], "dtype": "float32"}), []),
        (JSON, b'{"a":[' + b"[]," * 300_000 + b"[]]}", []),
    ],
)
def test_claims_cost_no_memory(content_type, body, query):
    tracemalloc.start()
    try:
        refused(MalformedBodyError, content_type, body, query)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body) + 200_000


def must_end(content_type: str | None, body: bytes, query: list[tuple[str, str]]) -> None:
    with contextlib.suppress(PidError):
        request = parse_request(content_type, body, query, ACCEPTS)
        assert request.latents.shape[1] == ACCEPTS.channels
        assert torch.isfinite(request.latents).all()


@given(st.sampled_from([SAFETENSORS, NPY, RAW, JSON, FORM_TYPE, FORM]), st.binary(max_size=200))
def test_random_bytes(content_type, body):
    must_end(content_type, body, [])
    must_end(content_type, body, [("shape", "1,4,8,8"), ("dtype", "float16")])


@given(st.sampled_from(sorted(VALID)), st.data())
@settings(max_examples=300)
def test_truncated_and_altered_bodies(kind, data):
    content_type, body, query = VALID[kind]
    altered = bytearray(body[: data.draw(st.integers(0, len(body)))]) or bytearray(1)
    reach = data.draw(st.sampled_from([64, 400, len(altered)]))  # headers are where the trouble is
    for place in data.draw(st.lists(st.integers(0, min(reach, len(altered)) - 1), max_size=4)):
        altered[place] ^= 1 << data.draw(st.integers(0, 7))
    must_end(content_type, bytes(altered), query)
    altered += body[len(altered) :]
    must_end(content_type, bytes(altered), query)


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
def test_any_json(members):
    must_end(JSON, json_body(**members), [])
    must_end(JSON, json_body(**{"latent": GOOD} | members), [])
    must_end(SAFETENSORS, safetensors_header(members), [])
    must_end(SAFETENSORS, safetensors_header({"latent": ENTRY | members}, CELLS), [])


@given(st.lists(st.tuples(st.sampled_from(["shape", "dtype", "sigma", "seed"]) | st.text(), st.text())), st.text())
def test_any_query_and_content_type(query, content_type):
    must_end(RAW, raw(LATENT), query)
    must_end(content_type, raw(LATENT), query)
    must_end(f"{FORM}; {content_type}", form(LATENT_PART), query)


# ---------------------------------------------------------------- receiving


def received(chunks: list[bytes], content_length: str | None = None, limit: int = 10) -> tuple[bytes, int]:
    """The body read, or the error raised; and how many chunks were taken from the connection."""
    taken = 0

    async def connection():
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    try:
        return asyncio.run(read_body(connection(), content_length, limit)), taken
    except PidError as error:
        return error, taken


@pytest.mark.parametrize("content_length", [None, "10", "0010"])
@pytest.mark.parametrize("chunks", [[b"0123456789"], [b"01234", b"", b"56789"], [bytes([c]) for c in b"0123456789"]])
def test_a_body_up_to_the_limit(chunks, content_length):
    body, taken = received(chunks, content_length)
    assert body == b"0123456789"
    assert taken == len(chunks)


def test_an_empty_body():
    assert received([]) == (b"", 0)
    assert received([b""], "0") == (b"", 1)


@pytest.mark.parametrize(
    ("content_length", "chunks", "taken"),
    [
        ("11", [b"a"], 0),  # refused before a byte is read
        ("99999999999999999999", [b"a"], 0),
        (None, [b"a" * 11], 1),
        (None, [b"a" * 6] * 100, 2),
        ("3", [b"a" * 6] * 100, 2),  # a lie
    ],
)
def test_bodies_over_the_limit(content_length, chunks, taken):
    error, read = received(chunks, content_length)
    assert isinstance(error, BodyTooLargeError)
    assert "10 bytes" in str(error)
    assert read == taken


@pytest.mark.parametrize("content_length", ["", "-1", "+5", "5.0", "0x5", "five", "5 ", "5, 5", "٥", "1" * 5000])
def test_content_lengths_that_are_no_numbers(content_length):
    error, taken = received([b"12345"], content_length)
    assert isinstance(error, MalformedBodyError)
    assert taken == 0


@pytest.mark.parametrize("content_length", ["4", "6", "0"])
def test_content_lengths_that_are_not_met(content_length):
    error, _ = received([b"12345"], content_length)
    assert isinstance(error, MalformedBodyError)
    assert "5 bytes" in str(error)


def test_parse_request_keeps_the_limit_itself():
    assert "bytes" in refused(BodyTooLargeError, RAW, bytes(ACCEPTS.max_body + 1))
