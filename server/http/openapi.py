"""OpenAPI description of /decode, whose handler reads raw bytes, so that FastAPI cannot derive it."""

from __future__ import annotations

import base64
import math
from typing import Any

from fastapi import FastAPI, Response

from server.body import media
from server.body.options import DEADLINE_HEADER
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.images.formats import IMAGE_FORMATS, MEDIA_TYPES
from server.request import DecodeOptions

MAX_EXAMPLE_BYTES = 32 * 1024  # size of a latent up to which /docs has an example

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
        "code": {"type": "string", "description": "stable, for programs to match"},
        "detail": {"type": "string", "description": "message for people"},
        "request_id": {"type": "string"},
    },
}
_PROBLEMS = {
    400: "The body is truncated, inconsistent or malformed.",
    401: "The API key is missing or unknown.",
    406: "None of the formats in the Accept header is supported.",
    408: "The body took too long to arrive.",
    413: "The body exceeds the size limit.",
    415: "The media type or content encoding is not supported.",
    422: "The request is not supported, has too large values, or would not be accepted by an idle server either.",
    429: "The queue is full, or the deadline would be missed; retry after the time in Retry-After.",
    431: "The request has too many or too large headers.",
    500: "This decode failed; others are not affected.",
    503: "The server is starting, stalled, draining, unhealthy or out of device memory.",
    504: "The request was accepted but not finished before its deadline.",
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
    raw = "only for application/octet-stream: "
    return [
        *options,
        {"name": DEADLINE_HEADER, "in": "header", "schema": deadline, "description": "same as deadline_ms"},
        {
            "name": "shape",
            "in": "query",
            "schema": {"type": "string"},
            "description": f"{raw}the shape, such as 16,64,64",
        },
        {"name": "dtype", "in": "query", "schema": _DTYPE, "description": f"{raw}the type of the elements"},
    ]


def decode_documentation() -> dict[str, Any]:
    """Return the arguments that describe the route: request bodies, options and responses."""
    json_body = {
        "type": "object",
        "required": ["latent"],
        "properties": {"latent": _TENSOR, "caption": _TENSOR, **_option_schema()},
    }
    form = {"type": "object", "properties": {"latent": {"type": "string", "format": "binary"}, **_option_schema()}}
    image = {MEDIA_TYPES[name]: _BINARY for name in IMAGE_FORMATS}
    problems = {
        status: {"description": text, "content": {PROBLEM_MEDIA_TYPE: {"schema": _PROBLEM}}}
        for status, text in _PROBLEMS.items()
    }
    return {
        "tags": ["decode"],
        "response_class": Response,
        "responses": {
            200: {"description": "The image, or one part per image.", "content": {**image, "multipart/mixed": _BINARY}},
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
    """Add an example body that this decoder accepts to /docs, unless its latent is too large to show.

    `latent_shape` is [c, h, w].
    """
    size = 2 * math.prod(latent_shape)
    if size > MAX_EXAMPLE_BYTES:
        return
    latent = {"data": base64.b64encode(bytes(size)).decode(), "shape": list(latent_shape), "dtype": "float16"}
    operation = app.openapi()["paths"]["/decode"]["post"]
    operation["requestBody"]["content"][media.JSON]["example"] = {"latent": latent, "seed": 7, "sigma": 0.0}
