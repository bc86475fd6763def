"""How `/decode` describes itself: the handler reads raw bytes, so nothing can be derived from its signature."""

from __future__ import annotations

import base64
import math
from typing import Any

from fastapi import FastAPI, Response

from server.body import media
from server.body.options import DEADLINE_HEADER
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.request import DecodeOptions

EXAMPLE_BYTES = 32 * 1024

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_DTYPE = {"type": "string", "enum": ["float16", "bfloat16", "float32"]}
_TENSOR = {
    "type": "object",
    "required": ["data", "shape", "dtype"],
    "properties": {
        "data": {"type": "string", "format": "byte", "description": "base64 of little-endian elements"},
        "shape": {"type": "array", "items": {"type": "integer"}, "description": "[c, h, w] or [B, c, h, w]"},
        "dtype": _DTYPE,
    },
}
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "stable, for programs"},
        "detail": {"type": "string", "description": "one sentence, for people"},
        "request_id": {"type": "string"},
    },
}
_PROBLEMS = {
    400: "The body is damaged or contradicts itself.",
    401: "The server wants an API key, and this is none that it knows.",
    406: "No image format of this server is acceptable to the client.",
    408: "The body took too long to arrive.",
    413: "The body is over the limit.",
    415: "The media type is not taken.",
    422: "A well-formed request for something this decoder does not do.",
    429: "The queue is full or the image would be late; Retry-After says when to try again.",
    431: "Too many or too large headers.",
    500: "This decode failed; others are not affected.",
    503: "Starting, draining, unhealthy, or out of device memory.",
    504: "Admitted, but not finished in time.",
}


def _option_schema() -> dict[str, Any]:
    properties: dict[str, Any] = DecodeOptions.model_json_schema()["properties"]
    return properties


def _parameters() -> list[dict[str, Any]]:
    options = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.get("description", "")}
        for name, schema in _option_schema().items()
    ]
    deadline = _option_schema()["deadline_ms"]
    raw = "for application/octet-stream only: "
    return [
        *options,
        {"name": DEADLINE_HEADER, "in": "header", "schema": deadline, "description": "the option deadline_ms"},
        {"name": "shape", "in": "query", "schema": {"type": "string"}, "description": f"{raw}16,64,64, say"},
        {"name": "dtype", "in": "query", "schema": _DTYPE, "description": f"{raw}the elements' type"},
    ]


def decode_documentation() -> dict[str, Any]:
    """Arguments for the route: request bodies, options and answers."""
    json_body = {
        "type": "object",
        "required": ["latent"],
        "properties": {"latent": _TENSOR, "caption": _TENSOR, **_option_schema()},
    }
    form = {"type": "object", "properties": {"latent": {"type": "string", "format": "binary"}, **_option_schema()}}
    image = {f"image/{name}": _BINARY for name in media.IMAGE_FORMATS}
    problems = {
        status: {"description": text, "content": {PROBLEM_MEDIA_TYPE: {"schema": _PROBLEM}}}
        for status, text in _PROBLEMS.items()
    }
    return {
        "tags": ["decode"],
        "response_class": Response,
        "responses": {
            200: {"description": "The image, or one part an image.", "content": {**image, "multipart/mixed": _BINARY}},
            **problems,
        },
        "openapi_extra": {
            "parameters": _parameters(),
            "requestBody": {
                "required": True,
                "content": {
                    media.JSON: {"schema": json_body},
                    media.SAFETENSORS: _BINARY,
                    media.NPY: _BINARY,
                    media.RAW: _BINARY,
                    media.FORM: {"schema": form},
                },
            },
        },
    }


def add_example(app: FastAPI, latent_shape: tuple[int, int, int]) -> None:
    """Let `/docs` start from a body that works with the decoder at hand, where one is small enough to show."""
    size = 2 * math.prod(latent_shape)
    if size > EXAMPLE_BYTES:
        return
    latent = {"data": base64.b64encode(bytes(size)).decode(), "shape": list(latent_shape), "dtype": "float16"}
    operation = app.openapi()["paths"]["/decode"]["post"]
    operation["requestBody"]["content"][media.JSON]["example"] = {"latent": latent, "seed": 7, "sigma": 0.0}
