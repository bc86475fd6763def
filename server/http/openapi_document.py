"""The OpenAPI document of the server: what its routes have in common."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel

from server.body import media
from server.http.models import DecodeBody, DecodedImages, DecodeForm, Health, Problem, client_schema
from server.http.openapi import ERRORS, describe_options, error_headers, option_types, schema_ref
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.http.protocols.kserve_request import InferenceBody
from server.http.protocols.kserve_response import InferenceAnswer, InferenceError
from server.http.protocols.remote_models import RemoteBody, RemoteImages

Json = dict[str, Any]

# Models that routes refer to with `schema_ref`. FastAPI adds those that it knows as types of responses.
COMPONENTS: tuple[type[BaseModel], ...] = (
    *(Problem, Health, DecodeBody, DecodeForm, DecodedImages),
    *(RemoteBody, RemoteImages),
    *(InferenceBody, InferenceAnswer, InferenceError),
)
MAX_EXAMPLE_BYTES = 32 * 1024  # size of a latent up to which /docs has an example

# Arguments of the application, in addition to its title and version.
DESCRIPTION: Json = {
    "summary": "Latents of a diffusion model in, images out.",
    "description": (
        "Decodes latents of diffusion models into images with PiD, a diffusion decoder.\n\n"
        "Options may be in the query, in a JSON body or in form fields; set each option in one place only. "
        "Every error has a member `code`, which is stable. It is a problem document (RFC 9457), except under `/v2`, "
        "where the member `error` has the message.\n\n"
        "If the server requires an API key, send it as `Authorization: Bearer KEY`."
    ),
    "contact": {"name": "Maintainers of the PiD decode server"},
    "license_info": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
    "servers": [{"url": "/", "description": "This server"}],
    "openapi_tags": [
        {"name": "decode", "description": "Latents to images"},
        {"name": "inference", "description": "The same by the KServe v2 protocol"},
        {"name": "health", "description": "Probes of orchestrators and load balancers; they need no API key"},
        {"name": "operation", "description": "What the server is and how it is doing"},
    ],
}
HEADERS: Json = {
    "X-Request-Id": ("string", "Id of the request in the server's log."),
    "X-Seed": ("string", "Seed of the decoder's noise; of a batch, the seeds of all images separated by commas."),
    "Server-Timing": ("string", "Milliseconds of each stage that ended before the headers were sent; not of a batch."),
    "Retry-After": ("integer", "Seconds after which a retry may succeed; with status 503 only if that is known."),
    "WWW-Authenticate": ("string", "Bearer"),
}
BEARER: Json = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key. Required if the server was started with --api-keys, and ignored otherwise.",
}


def complete_document(
    document: Json,
    decoders: Iterable[str],
    latent_shape: tuple[int, int, int],
    is_public: Callable[[str], bool],
    requires_keys: bool,
) -> None:
    """Add to a document of FastAPI what the descriptions in server/http/openapi.py refer to.

    Args:
        document: The document, which is changed.
        decoders: Names of the decoders.
        latent_shape: A shape [c, h, w] that the first decoder accepts, for an example.
        is_public: Returns whether a path never needs an API key.
        requires_keys: The other paths need one.
    """
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(_schemas())
    components["headers"] = {
        name: {"description": text, "schema": {"type": kind}} for name, (kind, text) in HEADERS.items()
    }
    components["responses"] = {name: _error(status) for status, (name, _) in ERRORS.items()}
    components["parameters"] = {
        key: {
            "name": key.lower(),
            "in": "path",
            "required": True,
            "description": "Name of the decoder.",
            "schema": {"type": "string", "enum": list(decoders)},
        }
        for key in ("Decoder", "Model")
    }
    components["securitySchemes"] = {"bearer": BEARER}
    document["security"] = [{"bearer": []}] if requires_keys else [{}, {"bearer": []}]
    for path, operations in document["paths"].items():
        if is_public(path):
            for operation in operations.values():
                operation["security"] = []
    _add_example(document, latent_shape)


def _schemas() -> Json:
    """Return the schemas of `COMPONENTS` and of the models in them, by name."""
    schemas = option_types()
    for model in COMPONENTS:
        schema = client_schema(model)
        schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
    for model in (DecodeBody, DecodeForm):
        properties = schemas[model.__name__]["properties"]
        properties |= describe_options(properties)
    return schemas


def _error(status: int) -> Json:
    """Return the response to an error."""
    return {
        "description": ERRORS[status][1],
        "headers": error_headers(status),
        "content": {PROBLEM_MEDIA_TYPE: {"schema": schema_ref(Problem)}},
    }


def _add_example(document: Json, latent_shape: tuple[int, int, int]) -> None:
    """Add a body that the decoder accepts, which /docs offers to send, unless it is too large to show."""
    size = 2 * math.prod(latent_shape)
    if size <= MAX_EXAMPLE_BYTES:
        latent = {"data": base64.b64encode(bytes(size)).decode(), "shape": list(latent_shape), "dtype": "float16"}
        content = document["paths"]["/decode"]["post"]["requestBody"]["content"]
        content[media.JSON]["example"] = {"latent": latent, "seed": 7, "sigma": 0.0}
