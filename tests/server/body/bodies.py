"""Builders of request bodies, the limits they are parsed with, and the check of a rejection."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from engines.errors import PidError
from engines.size import Size
from server.body.head import read_head
from server.body.media import FORM, JSON, NPY, RAW, SAFETENSORS
from server.body.parse import parse_body
from server.request import DecodeRequest, DecoderLimits, ServerLimits

DECODER = DecoderLimits(
    name="test",
    latent_space="flux",
    channels=4,
    latent_sizes=(Size(8, 8), Size(8, 12), Size(16, 16)),
    pixels_per_cell=32,
    upscale=4,
    caption_tokens=3,
    caption_width=5,
    max_images=3,
    accepts_prompts=True,
)


def limits_of(*decoders: DecoderLimits) -> ServerLimits:
    """Return the limits of a server with these decoders."""
    return ServerLimits({decoder.name: decoder for decoder in decoders}, max_body_bytes=1 << 20)


LIMITS = limits_of(DECODER)
LATENT = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)).bfloat16().half().float()
CAPTION = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
ONE = torch.zeros(4, 8, 8)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ENTRY = {"dtype": "F32", "shape": [4, 8, 8], "data_offsets": [0, 1024]}  # of a safetensors header
CELLS = bytes(1024)  # the data of ENTRY
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
    """A form of parts: the headers after `Content-Disposition: form-data; `, and the data."""
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


def parse_request(
    content_type: str | None, body: bytes | bytearray, query: list[tuple[str, str]], limits: ServerLimits = LIMITS
) -> DecodeRequest:
    """Parse the head and the body of a request without a Content-Length."""
    headers = [] if content_type is None else [("content-type", content_type)]
    return parse_body(read_head(headers, query, limits), body, limits)


def rejected(error: type[PidError], content_type: str | None, body: bytes, query=(), limits=LIMITS) -> str:
    """Return the message with which a request is rejected: one short line without the text of a library's error."""
    with pytest.raises(error) as raised:
        parse_request(content_type, body, list(query), limits)
    assert type(raised.value) is error
    message = str(raised.value)
    assert len(message) < 320
    assert message.isprintable()
    assert message.endswith(".")
    assert not any(word in message for word in ("Traceback", "Error", "site-packages", ".py:"))
    return message
