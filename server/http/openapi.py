"""Descriptions of routes for the OpenAPI document.

FastAPI derives neither bodies nor options of decode requests, because their handlers read raw bytes. The functions here
return arguments of a route; server/http/openapi_document.py completes the document with what they refer to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from server.body import media
from server.body.negotiation import EVENTS, MULTIPART, REPLACE, ZIP
from server.body.options import DEADLINE_HEADER
from server.http.models import SCHEMA_REF, DecodeBody, DecodedImages, DecodeForm, Dtype, Health, Problem, client_schema
from server.http.problem import PROBLEM_MEDIA_TYPE
from server.images.formats import IMAGE_FORMATS, MEDIA_TYPES
from server.request import DecodeOptions

Json = dict[str, Any]
Content = Mapping[str, Json]  # media type objects, by media type

BINARY: Json = {"schema": {"type": "string", "format": "binary"}}
TEXT: Content = {"text/plain": {"schema": {"type": "string"}}}

# Status: name of the response in the document, and description.
ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("BadRequest", "The request or its body is truncated, inconsistent or malformed."),
    401: ("Unauthorized", "The API key is missing or unknown."),
    404: ("NotFound", "The path does not exist, or the server has no decoder of this name; check the URL."),
    405: ("MethodNotAllowed", "The path does not support this method."),
    406: ("NotAcceptable", "None of the media types in the Accept header is supported."),
    408: ("RequestTimeout", "The body took too long to arrive."),
    413: ("ContentTooLarge", "The body exceeds the size limit."),
    415: ("UnsupportedMediaType", "The media type or content encoding is not supported."),
    422: (
        "UnprocessableContent",
        "The request is not supported, has too large values, or would not be accepted by an idle server either.",
    ),
    429: ("TooManyRequests", "A limit is reached, or the deadline would be missed; retry after Retry-After."),
    431: ("RequestHeaderFieldsTooLarge", "The request has too many or too large headers."),
    500: ("InternalServerError", "This request failed; others are not affected."),
    503: ("ServiceUnavailable", "The server is starting, stalled, draining, unhealthy, out of memory or overloaded."),
    504: ("GatewayTimeout", "The request was accepted but not finished before its deadline."),
}
ANY_REQUEST = (400, 404, 405, 431, 500, 503)  # errors that every request can get
PROTECTED = (*ANY_REQUEST, 401, 429)  # and one that may need a key
DECODE = tuple(ERRORS)

_MEANINGS: Mapping[str, str] = {
    "decoder": "Name of the decoder, which is needed if several support the latent's shape",
    "sigma": "Noise level of the latent; 0 if the diffusion is finished",
    "seed": "Seed of the decoder's noise; image i of a batch uses seed + i; random by default",
    "steps": "Number of denoising steps",
    "prompt": "Caption as text, one for all images or one per image, if the server has a text encoder",
    "height": "Height in pixels of the image before upscaling, for packed latents",
    "width": "Width in pixels of the image before upscaling, for packed latents",
    "format": "Image format; by default, the Accept header decides",
    "tile": "Decode an image larger than the decoder's sizes in tiles, if the server allows it, or reject it",
    "compression": "Compression effort for PNG",
    "quality": "Quality of WebP and JPEG",
    "metadata": "Write the settings of the decode into a PNG",
    "preview": "Send a small JPEG of the predicted image after each step, before the image",
    "priority": "Scheduling class",
    "deadline_ms": "Deadline in milliseconds after the acceptance of the request; set by the server by default",
}

# Options whose values are a type of their own in generated clients, the same in the query and in bodies.
_NAMED_TYPES: Mapping[str, str] = {
    "format": "ImageFormat",
    "tile": "Tile",
    "compression": "Compression",
    "preview": "Previews",
    "priority": "Priority",
}


def schema_ref(model: type[BaseModel]) -> Json:
    """Return a reference to the schema of `model`, one of `COMPONENTS` in server/http/openapi_document.py."""
    return _ref(model.__name__)


def header_refs(*names: str) -> Json:
    """Return the response headers with these names, which the document defines once."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def error_responses(statuses: Iterable[int], content: Content | None = None) -> Json:
    """Return the responses with these statuses: problem documents, unless a protocol has another `content`."""
    if content is None:
        return {str(status): {"$ref": f"#/components/responses/{ERRORS[status][0]}"} for status in sorted(statuses)}
    return {
        str(status): {"description": ERRORS[status][1], "headers": error_headers(status), "content": content}
        for status in sorted(statuses)
    }


def error_headers(status: int) -> Json:
    """Return the headers of the response to an error."""
    by_status = {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}
    return header_refs("X-Request-Id", *by_status.get(status, ()))


def option_parameters(without: Collection[str] = ()) -> list[Json]:
    """Return the options of a decode as parameters of the query, and the headers with a meaning in every protocol.

    `without` has the names of options that the protocol does not support. None is required and none has a default,
    so that a generated client sends only what its caller sets: the same option in the body with another value would
    be an error.
    """
    schemas = describe_options(client_schema(DecodeOptions)["properties"])
    schemas["prompt"]["anyOf"].remove({"type": "string"})  # in a query, that is a list of one
    schemas["prompt"] |= schemas["prompt"].pop("anyOf").pop()
    deadline = {
        **schemas["deadline_ms"],
        "description": "How long the client waits, in milliseconds: deadline_ms, but limited to the server's maximum.",
    }
    request_id = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
    return [
        *(_parameter(name, "query", schema) for name, schema in schemas.items() if name not in without),
        _parameter(DEADLINE_HEADER, "header", deadline),
        _parameter(
            "X-Request-Id",
            "header",
            {**request_id, "description": "Id of the request in the server's log; random by default."},
        ),
    ]


def model_parameters(model: type[BaseModel]) -> list[Json]:
    """Return the fields of `model`, each of which has a description, as parameters of the query."""
    return [_parameter(name, "query", schema) for name, schema in client_schema(model)["properties"].items()]


def raw_parameters() -> list[Json]:
    """Return the parameters that describe a body of raw elements."""
    raw = f"Only for {media.RAW} with raw elements"
    return [
        _parameter("shape", "query", {"type": "string", "description": f"{raw}: the shape, such as 16,64,64."}),
        _parameter("dtype", "query", {**_ref(Dtype.__name__), "description": f"{raw}: their type."}),
    ]


def option_types() -> Json:
    """Return the schemas of those options whose type has a name, by this name."""
    schemas = client_schema(DecodeOptions)["properties"]
    return {
        name: {"type": "string", "enum": schemas[option]["enum"], "description": _description(option)}
        for option, name in _NAMED_TYPES.items()
    }


def describe_options(schemas: Json) -> Json:
    """Return the schemas of the options, by name, as clients need them, with `schemas` as pydantic generates them."""
    described = {}
    for name in DecodeOptions.model_fields:
        schema = _ref(_NAMED_TYPES[name]) if name in _NAMED_TYPES else schemas[name]
        described[name] = {**schema, "description": _description(name)}
        if "exclusiveMaximum" in schema:  # a seed, which generators would otherwise read as 32 bits
            described[name]["format"] = "int64"
    return described


def _ref(name: str) -> Json:
    return {"$ref": SCHEMA_REF.format(model=name)}


def _parameter(name: str, place: str, schema: Json) -> Json:
    """Return an optional parameter of the query or the headers; the schema's description becomes its own."""
    schema = dict(schema)
    return {"name": name, "in": place, "required": False, "description": schema.pop("description"), "schema": schema}


def _description(option: str) -> str:
    """Return the meaning of an option and its default."""
    default = DecodeOptions.model_fields[option].default
    text = f"{default:g}" if isinstance(default, float) else str(default).lower()
    return f"{_MEANINGS[option]}." if default is None else f"{_MEANINGS[option]}; {text} by default."


def image_content() -> Content:
    """Return the content of a response with images: each format alone, then the containers of a batch."""
    images = {MEDIA_TYPES[name]: BINARY for name in IMAGE_FORMATS}
    return {**images, MULTIPART: BINARY, media.JSON: {"schema": schema_ref(DecodedImages)}, ZIP: BINARY}


def describe_decode(
    operation_id: str,
    summary: str,
    body: Content,
    parameters: list[Json],
    images: Content,
    description: str = "The image, or all images in a container.",
    errors: Content | None = None,
) -> Json:
    """Return the arguments of a route that decodes.

    Args:
        operation_id: The name of a function in generated clients.
        summary: A few words.
        body: The request bodies. The first one is what /docs offers first.
        parameters: As from `option_parameters`.
        images: The content of the response, as from `image_content`.
        description: The meaning of the response.
        errors: The content of errors, if they are not problem documents.
    """
    success = {
        "description": description,
        "headers": header_refs("X-Request-Id", "X-Seed", "Server-Timing"),
        "content": dict(images),
    }
    return {
        "operation_id": operation_id,
        "summary": summary,
        "tags": ["decode"],
        "response_class": Response,
        "openapi_extra": {
            "parameters": parameters,
            "requestBody": {"required": True, "content": dict(body)},
            "responses": {"200": success, **error_responses(DECODE, errors)},
        },
    }


def name_decoder(arguments: Json) -> Json:
    """Return the arguments of the route that decodes with the decoder in its path, from those of the one without."""
    extra = arguments["openapi_extra"]
    others = [parameter for parameter in extra["parameters"] if parameter.get("name") != "decoder"]
    return arguments | {
        "operation_id": f"{arguments['operation_id']}_with",
        "summary": f"{arguments['summary']} with a decoder of this name",
        "openapi_extra": extra | {"parameters": [{"$ref": "#/components/parameters/Decoder"}, *others]},
    }


def decode_documentation() -> Json:
    """Return the arguments of the route `POST /decode`."""
    body = {
        media.JSON: {"schema": schema_ref(DecodeBody)},
        media.SAFETENSORS: BINARY,
        media.NPY: BINARY,
        media.FORM: {"schema": schema_ref(DecodeForm)},
        media.RAW: BINARY,  # last: where all files have the same type, generated clients declare the last one
    }
    parameters = [*option_parameters(), *raw_parameters()]
    images = {**image_content(), EVENTS: TEXT["text/plain"], REPLACE: BINARY}
    return describe_decode("decode", "Decode latents", body, parameters, images)


def describe_get(
    tag: str,
    summary: str,
    content: Content | None = None,
    errors: Iterable[int] = PROTECTED,
    error_content: Content | None = None,
) -> Json:
    """Return the arguments of a route for GET.

    Args:
        tag: One of the tags in server/http/openapi_document.py.
        summary: A few words.
        content: The content of the response, unless the handler returns a model.
        errors: The statuses of errors.
        error_content: The content of errors, if they are not problem documents.
    """
    success: Json = {"description": "Success.", "headers": header_refs("X-Request-Id")}
    if content is not None:
        success["content"] = dict(content)
    arguments = {
        "tags": [tag],
        "summary": summary,
        "openapi_extra": {"responses": {"200": success, **error_responses(errors, error_content)}},
    }
    return arguments if content is None else {**arguments, "response_class": Response}


def describe_probe(summary: str) -> Json:
    """Return the arguments of a route that reports the state of the server with status 200 or 503."""
    headers, state = header_refs("X-Request-Id"), {media.JSON: {"schema": schema_ref(Health)}}
    problem = {PROBLEM_MEDIA_TYPE: {"schema": schema_ref(Problem)}}  # if the server is out of memory
    return {
        "tags": ["health"],
        "summary": summary,
        "response_class": Response,
        "openapi_extra": {
            "responses": {
                "200": {"description": "Yes.", "headers": headers, "content": state},
                **error_responses(ANY_REQUEST),
                "503": {"description": "No.", "headers": headers, "content": {**state, **problem}},
            }
        },
    }
