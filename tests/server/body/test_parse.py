"""Valid request bodies of every kind, and requests that this decoder does not support."""

from __future__ import annotations

import base64
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.errors import (
    InvalidCaptionError,
    InvalidLatentError,
    InvalidOptionError,
    UnsupportedMediaTypeError,
)
from tests.server.body.bodies import (
    BOUNDARY,
    CAPTION,
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
    limits_of,
    npy,
    packed,
    parse_request,
    raw,
    raw_query,
    rejected,
    safetensors_header,
)


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("buffer", [bytes, bytearray])
def test_every_kind_of_body_gives_the_same_latent(kind, buffer):
    content_type, body, query = VALID[kind]
    request = parse_request(content_type, buffer(body), query, LIMITS)
    assert torch.equal(request.latents, LATENT)
    assert request.latents.dtype == torch.float32
    assert request.latents.is_contiguous()
    assert (request.captions is not None) == (kind == "safetensors")
    assert request.options.sigma == (0.5 if kind in ("json", "form") else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [True, False])
def test_dtypes_are_widened_exactly_and_a_single_latent_becomes_a_batch(dtype, batched):
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
        assert torch.equal(parse_request(content_type, body, query, LIMITS).latents, expected)


def test_options_may_be_in_the_query_in_json_and_in_form_fields():
    query = [("steps", "2"), ("metadata", "true")]
    for content_type, body in [
        (JSON, json_body(latent=packed(LATENT), seed=7, steps=2)),
        (FORM_TYPE, form(file_part(npy(LATENT.numpy())), ('name="seed"', b"7"), ('name="steps"', b"2"))),
    ]:
        options = parse_request(content_type, body, query, LIMITS).options
        assert (options.seed, options.steps, options.metadata) == (7, 2, True)
        with pytest.raises(InvalidOptionError, match="steps is set to both"):
            parse_request(content_type, body, [("steps", "3")], LIMITS)


def test_case_and_parameters_of_a_media_type_are_ignored():
    assert parse_request("Application/JSON; charset=UTF-8", json_body(latent=packed(LATENT)), [], LIMITS)


@pytest.mark.parametrize(
    "declared", [(f"Content-Type: {NPY}", "x"), (f"Content-Type: {RAW}", "x.npy"), ("A: b", "X.NPY")]
)
def test_the_kind_of_a_form_file_is_its_media_type_or_its_suffix(declared):
    header, name = declared
    part = (f"name=latent; filename*=UTF-8''{name}\r\n{header}", npy(LATENT.numpy()))
    assert torch.equal(parse_request(FORM_TYPE, form(part), [], LIMITS).latents, LATENT)


def test_captions_are_widened_and_one_is_expanded_to_the_batch():
    def parse(caption: torch.Tensor) -> torch.Tensor | None:
        body = save_safetensors({"latent": LATENT, "caption": caption})
        in_json = json_body(latent=packed(LATENT), caption=packed(caption))
        captions = parse_request(SAFETENSORS, body, [], LIMITS).captions
        assert torch.equal(captions, parse_request(JSON, in_json, [], LIMITS).captions)
        return captions

    assert torch.equal(parse(CAPTION), CAPTION)
    assert torch.equal(parse(CAPTION.half()), CAPTION.half().float())
    assert torch.equal(parse(CAPTION[0]), CAPTION[:1].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"\r\n", b"\r\n"),
        (b"This is a message in MIME format.\r\n", b"the end"),
        (b"--\r\n--" + BOUNDARY.encode()[:-1] + b"\r\n", f"\r\n--{BOUNDARY}\r\n\r\nno part".encode()),
        (b"\r\n" * 600_000, b"\xff" * 100),
    ],
)
def test_text_before_and_after_the_parts_of_a_form_is_ignored(before, after):
    body = before + form(file_part(npy(LATENT.numpy())), ('name="sigma"', b"0.5")) + after
    request = parse_request(FORM_TYPE, body, [])
    assert torch.equal(request.latents, LATENT)
    assert request.options.sigma == 0.5


def test_data_that_is_almost_a_boundary_belongs_to_the_part():
    data = ((b"\r\n--" + BOUNDARY.encode()[:-1]) * 100)[:512]
    body = form(file_part(data, "latent"))
    assert raw(parse_request(FORM_TYPE, body, raw_query(ONE.half())).latents.half()) == data


@pytest.mark.parametrize("before", [b"text", b"text\n", b" "])
def test_a_boundary_is_at_the_beginning_of_a_line(before):
    rejected(InvalidLatentError, FORM_TYPE, before + form(file_part(npy(LATENT.numpy()))))


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save(LATENT, file)
    return file.getvalue()


PICKLES = [torch_file(), *(pickle.dumps(LATENT.numpy(), protocol) for protocol in range(2, 6))]


@pytest.mark.parametrize(
    ("content_type", "part"),
    [
        ("image/png", "'image/png'"),
        ("application/x-pytorch", "'application/x-pytorch'"),
        ("application", "'application'"),
        ("x" * 100_000, "'xxx"),
    ],
)
def test_an_unknown_media_type_is_rejected_with_the_supported_ones(content_type, part):
    message = rejected(UnsupportedMediaTypeError, content_type, b"")
    assert part in message
    assert all(kind in message for kind in (SAFETENSORS, NPY, RAW, JSON, FORM))


@pytest.mark.parametrize("body", PICKLES, ids=["torch", "2", "3", "4", "5"])
@pytest.mark.parametrize("content_type", [SAFETENSORS, NPY, RAW, JSON, FORM_TYPE])
def test_pickles_are_never_opened(content_type, body):
    query = raw_query(LATENT) if content_type == RAW else []
    assert "never opened" in rejected(UnsupportedMediaTypeError, content_type, body, query)
    assert "never opened" in rejected(UnsupportedMediaTypeError, FORM_TYPE, form(file_part(body)))
    enclosed = packed(LATENT) | {"data": base64.b64encode(body).decode()}
    assert "never opened" in rejected(UnsupportedMediaTypeError, JSON, json_body(latent=enclosed))


@pytest.mark.parametrize("start", [b"\x80\x02\x8a\x0a", b"PK\x03\x04"])
def test_raw_elements_of_the_right_size_may_begin_like_a_pickle(start):
    body = start + raw(LATENT)[4:]
    assert raw(parse_request(RAW, body, raw_query(LATENT), LIMITS).latents)[:4] == start


def test_a_safetensors_header_length_may_begin_like_a_pickle():
    header = json.dumps({"latent": {"dtype": "F32", "shape": [4, 8, 8], "data_offsets": [0, 1024]}}).ljust(0x280)
    body = safetensors_header(header, bytes(1024))
    assert body[:2] == b"\x80\x02"
    assert parse_request(SAFETENSORS, body, [], LIMITS).latents.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("name", ["latent.pt", "latent.PTH", "a/b.pkl", "latent.ckpt"])
def test_a_form_file_with_a_pickle_suffix_is_rejected(name):
    part = file_part(npy(LATENT.numpy()), name, SAFETENSORS)
    assert "may be a pickle" in rejected(UnsupportedMediaTypeError, FORM_TYPE, form(part))


@pytest.mark.parametrize(
    "headers",
    ['name="latent"', 'name="latent"; filename="a"', 'name="latent"; filename="a.png"\r\nContent-Type: image/png'],
)
def test_a_form_file_of_unknown_kind_is_rejected(headers):
    rejected(UnsupportedMediaTypeError, FORM_TYPE, form((headers, b"abc")))


def with_value(value: float, dtype: torch.dtype) -> torch.Tensor:
    latent = LATENT.to(dtype, copy=True)
    latent[1, 2, 3, 4] = value
    return latent


@pytest.mark.parametrize(
    ("latent", "part"),
    [
        (torch.zeros(16, 8, 8), "16 channels; this decoder needs 4, as [4, h, w]"),
        (torch.zeros(8, 8, 4), "8 channels"),
        (torch.zeros(0, 8, 8), "0 channels"),
        (torch.zeros(0, 4, 8, 8), "batch of 0; send 1 to 3"),
        (torch.zeros(4, 4, 8, 8), "batch of 4; send 1 to 3"),
        (torch.zeros(4, 0, 8), "height 0 and width 8"),
        (torch.zeros(4, 7, 8), "8x8 (for 256x256 pixels), 8x12 (for 256x384 pixels) or 16x16 (for 512x512 pixels)"),
        (torch.zeros(4, 12, 8), "height 12 and width 8"),
        (torch.zeros(8, 8), "2 dimensions"),
        (torch.zeros(1, 1, 1, 4, 8, 8), "6 dimensions"),
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
        *(
            (with_value(value, dtype), "over 1e+12 in magnitude")
            for value in (1.01e12, -1e20, 1e38)
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
)
def test_an_unsupported_latent_is_rejected(latent, part):
    assert part in rejected(InvalidLatentError, SAFETENSORS, save_safetensors({"latent": latent}))
    if latent.dtype in DTYPES.values():
        assert part in rejected(InvalidLatentError, JSON, json_body(latent=packed(latent)))
        if latent.ndim:
            assert part in rejected(InvalidLatentError, RAW, raw(latent), raw_query(latent))


@pytest.mark.parametrize("value", [1e12, -1e12, 1e3, 1e-45, -0.0])
def test_large_and_tiny_values_are_accepted(value):
    latent = with_value(value, torch.float32)
    assert torch.equal(parse_request(NPY, npy(latent.numpy()), [], LIMITS).latents, latent)


def test_an_empty_latent_with_huge_dimensions_is_rejected():
    shapes = [[4, 0, 10**4000], [0, 4, 10**30, 10**30], [10**4000, 0, 8]]
    for shape in shapes:
        rejected(InvalidLatentError, JSON, json_body(latent={"data": "", "shape": shape, "dtype": "float32"}))


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
def test_an_unsupported_npy_dtype_is_rejected(array):
    message = rejected(InvalidLatentError, NPY, npy(array))
    assert "send it as little-endian float16 or float32" in message


@pytest.mark.parametrize("dtype", ["float64", "F32", "", "x" * 10_000])
def test_an_unsupported_raw_dtype_is_rejected(dtype):
    rejected(InvalidLatentError, RAW, raw(LATENT), [("shape", "2,4,8,12"), ("dtype", dtype)])
    rejected(InvalidLatentError, JSON, json_body(latent=packed(LATENT) | {"dtype": dtype}))


def test_a_body_must_have_a_latent_and_no_unexpected_tensors():
    unknown = save_safetensors({"latents": LATENT, "noise": ONE})
    message = rejected(InvalidLatentError, SAFETENSORS, unknown)
    assert "latents" in message
    assert "noise" in message
    assert "no tensor named 'latent'" in rejected(
        InvalidLatentError, SAFETENSORS, save_safetensors({"caption": CAPTION})
    )
    assert "no tensor named 'latent'" in rejected(InvalidLatentError, SAFETENSORS, save_safetensors({}))
    assert "no tensor named 'latent'" in rejected(InvalidLatentError, JSON, b"{}")
    assert "no field 'latent'" in rejected(InvalidLatentError, FORM_TYPE, form(('name="sigma"', b"0")))
    assert "no field 'latent'" in rejected(InvalidLatentError, FORM_TYPE, form())
    rejected(InvalidLatentError, SAFETENSORS, safetensors_header({"x" * 60_000: ENTRY}, CELLS))


def test_metadata_of_a_safetensors_file_is_ignored():
    metadata = {"workflow": ",[{" * 5000}
    assert parse_request(SAFETENSORS, save_safetensors({"latent": LATENT}, metadata), [], LIMITS)


@pytest.mark.parametrize(
    ("caption", "part"),
    [
        (torch.zeros(7, 5), "7 tokens of width 5; this decoder needs exactly 3 tokens"),
        (torch.zeros(0, 5), "0 tokens"),
        (torch.zeros(3, 4), "width 4"),
        (torch.zeros(1, 3, 5), "batch of 1; send 2, one per latent"),
        (torch.zeros(3, 3, 5), "batch of 3"),
        (torch.zeros(0, 3, 5), "batch of 0"),
        (torch.zeros(5), "1 dimension"),
        (torch.zeros(1, 2, 3, 5), "4 dimensions"),
        (torch.zeros(3, 5).long(), "dtype 'I64'"),
        (torch.full((3, 5), float("nan")), "NaN"),
        (torch.full((3, 5), float("inf")).half(), "infinity"),
        (torch.full((3, 5), -1e13), "over 1e+12"),
    ],
)
def test_an_unsupported_caption_is_rejected(caption, part):
    body = save_safetensors({"latent": LATENT, "caption": caption})
    assert part in rejected(InvalidCaptionError, SAFETENSORS, body)


def test_a_decoder_without_captions_rejects_one():
    limits = limits_of(replace(DECODER, caption_tokens=0, caption_width=0, accepts_prompts=False))
    body = save_safetensors({"latent": LATENT, "caption": CAPTION})
    assert "omit it" in rejected(InvalidCaptionError, SAFETENSORS, body, limits=limits)
    assert parse_request(NPY, npy(LATENT.numpy()), [], limits).captions is None
