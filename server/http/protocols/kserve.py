"""The KServe v2 inference protocol with Triton's extension for binary tensors, for clients such as tritonclient.

The models are the decoders of the server. Their inputs are `latent` and, optionally, `caption` or `prompt`; options are
parameters of the request. Outputs are `image` (BYTES, one encoded image each), `pixels` (UINT8) and `seed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engines import __version__
from server.body.headers import Fields, read_headers
from server.body.media import JSON, RAW, unsupported
from server.body.options import merge_options
from server.body.parse import build_request
from server.body.prompts import check_prompts
from server.body.quoting import one_of, quote
from server.body.selection import candidates
from server.errors import MalformedBodyError, UnknownModelError, count_of
from server.http.openapi import BINARY, Content, describe_decode, describe_get, option_parameters, schema_ref
from server.http.protocols.base import DecodeProtocol, Document, Endpoint, Head, ParsedRequest
from server.http.protocols.kserve_request import InferenceBody, read_request
from server.http.protocols.kserve_response import (
    HEADER_LENGTH,
    VERSION,
    InferenceAnswer,
    InferenceError,
    InferResponse,
)
from server.images.formats import IMAGE_FORMATS, OutputFormat
from server.lifecycle import State
from server.metrics import ProtocolName
from server.request import DecodeOptions, DecoderLimits, ServerLimits
from server.service import DecodeService

PLATFORM = "pid"
LIVE, READY = "/v2/health/live", "/v2/health/ready"
_MODELS = "/v2/models"
_MODEL = f"{_MODELS}/{{model}}"
_INFER = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")


class KServe(DecodeProtocol):
    """Tensors in JSON or binary in, tensors out."""

    name: ProtocolName = "kserve"
    decoder_parameter = "model"

    def owns(self, path: str) -> bool:
        """Return whether `path` belongs to version 2 of the protocol."""
        return path == "/v2" or path.startswith("/v2/")

    def route_of(self, path: str) -> str | None:
        """Return the route of an inference request."""
        return f"{_MODEL}/infer" if _INFER.fullmatch(path) else None

    def router(self, decode: Endpoint) -> APIRouter:
        """Return the routes for inference, metadata and health."""
        router = APIRouter()

        async def infer(request: Request) -> Response:
            """Decode latents."""
            _find_model(request)
            return await decode(request)

        router.add_api_route("/v2", _server_metadata, **_describe("server_metadata", "Describe the server", _ERRORS))
        router.add_api_route(LIVE, _live, **_describe("server_live", "Report whether the server works"))
        router.add_api_route(READY, _ready, **_describe("server_ready", "Report whether the server accepts requests"))
        router.add_api_route(_MODELS, _models, **_describe("models", "List the decoders", _ERRORS))
        for path, listed in ((_MODEL, True), (f"{_MODEL}/versions/{{version}}", False)):
            add = partial(router.add_api_route, include_in_schema=listed)
            add(path, _model_metadata, **_describe_model("model_metadata", "Describe the decoder", _ERRORS))
            add(f"{path}/ready", _model_ready, **_describe_model("model_ready", "Report whether the decoder is ready"))
            add(f"{path}/infer", infer, methods=["POST"], **_describe_infer())
        return router

    def read_head(self, headers: Iterable[tuple[str, str]], query: Fields, limits: ServerLimits) -> Head:
        """Validate the headers and the query, which may have options as well.

        Raises:
            UnsupportedMediaTypeError, BodyTooLargeError, MalformedBodyError: the body cannot be read.
            InvalidOptionError: an option is invalid.
        """
        headers = list(headers)
        values = read_headers(headers, limits)
        if values.media_type not in (RAW, JSON, ""):
            raise unsupported(f"Content-Type {quote(values.media_type)} is not supported", (RAW, JSON))
        lengths = [value for name, value in headers if name == HEADER_LENGTH.lower()]
        options = merge_options(DecodeOptions(), [*query, *values.deadline])
        check_prompts(options, candidates(options, limits))
        parse = partial(_parse, options, _header_length(lengths), limits)
        return Head(options, False, values.content_length, parse)

    def error_body(self, document: Document) -> tuple[str, Document]:
        """Return a JSON object with the message in `error`, the stable code and the id of the request."""
        others: Document = {name: document[name] for name in ("code", "request_id") if name in document}
        return JSON, {"error": document["detail"], **others}


# Description for the OpenAPI document

_OBJECT: Content = {JSON: {"schema": {"type": "object"}}}
_ERRORS: Content = {JSON: {"schema": schema_ref(InferenceError)}}
_MODEL_PARAMETER = {"$ref": "#/components/parameters/Model"}


def _describe(operation_id: str, summary: str, errors: Content = _OBJECT) -> Document:
    """Return the arguments of a route for GET; a state is reported in the same form with an error's status."""
    return describe_get("inference", summary, _OBJECT, error_content=errors) | {"operation_id": operation_id}


def _describe_model(operation_id: str, summary: str, errors: Content = _OBJECT) -> Document:
    """Return the arguments of a route for GET whose path names the model."""
    arguments = _describe(operation_id, summary, errors)
    arguments["openapi_extra"]["parameters"] = [_MODEL_PARAMETER]
    return arguments


def _describe_infer() -> Document:
    """Return the arguments of the route for inference."""
    length = {
        "name": HEADER_LENGTH,
        "in": "header",
        "required": False,
        "description": "Length of the JSON in bytes, if binary tensors follow it.",
        "schema": {"type": "integer"},
    }
    return describe_decode(
        "infer",
        "Decode latents",
        {JSON: {"schema": schema_ref(InferenceBody)}, RAW: BINARY},
        [_MODEL_PARAMETER, length, *option_parameters(without=["preview", "decoder"])],
        {JSON: {"schema": schema_ref(InferenceAnswer)}, RAW: BINARY},
        "The outputs.",
        _ERRORS,
    ) | {"tags": ["inference"]}


# Metadata and health


async def _server_metadata(request: Request) -> JSONResponse:
    """Return the name, version and extensions of the server."""
    return JSONResponse({"name": "pid-decode-server", "version": __version__, "extensions": ["binary_tensor_data"]})


async def _models(request: Request) -> JSONResponse:
    """Return the names of the models."""
    return JSONResponse({"models": list(_service(request).limits.decoders)})


async def _live(request: Request) -> JSONResponse:
    """Return 200 while the server works, and 503 once it has to be restarted."""
    live = _service(request).lifecycle.state is not State.FAILED
    return JSONResponse({"live": live}, 200 if live else 503)


async def _ready(request: Request) -> JSONResponse:
    """Return 200 if the server accepts requests, otherwise 503."""
    ready = _service(request).lifecycle.state is State.READY
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _model_ready(request: Request) -> JSONResponse:
    """Return 200 if the server accepts requests for the model, otherwise 503."""
    model = _find_model(request)
    ready = _service(request).is_ready(model.name)
    return JSONResponse({"name": model.name, "ready": ready}, 200 if ready else 503)


async def _model_metadata(request: Request) -> JSONResponse:
    """Return the inputs and outputs of the model."""
    model = _find_model(request)
    inputs = [_tensor("latent", "FP32", [-1, model.channels, -1, -1])]
    if model.caption_tokens:
        inputs.append(_tensor("caption", "FP32", [-1, model.caption_tokens, model.caption_width]))
    if model.accepts_prompts:
        inputs.append(_tensor("prompt", "BYTES", [-1]))
    outputs = [
        _tensor("image", "BYTES", [-1]),
        _tensor("pixels", "UINT8", [-1, -1, -1, 3]),
        _tensor("seed", "UINT64", [-1]),
    ]
    document = {"name": model.name, "versions": [VERSION], "platform": PLATFORM, "inputs": inputs, "outputs": outputs}
    return JSONResponse(document)


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _find_model(request: Request) -> DecoderLimits:
    """Return the decoder that the path names. Raises UnknownModelError if the server does not have it."""
    decoders = _service(request).limits.decoders
    model, version = request.path_params["model"], request.path_params.get("version", VERSION)
    if model not in decoders:
        raise UnknownModelError(f"Unknown model {quote(model)}; this server has {one_of(map(quote, decoders))}.")
    if version != VERSION:
        raise UnknownModelError(f"The model {model} has no version {quote(version)}; its only version is {VERSION}.")
    return decoders[model]


def _service(request: Request) -> DecodeService:
    service: DecodeService = request.app.state.service
    return service


# Inference


def _header_length(values: list[str]) -> int | None:
    if not values:
        return None
    if len(values) > 1 or not (values[0].isascii() and values[0].isdigit() and len(values[0]) <= 20):
        raise MalformedBodyError(f"The header {HEADER_LENGTH} is invalid; it is the length of the JSON in bytes.")
    return int(values[0])


def _parse(
    options: DecodeOptions, header_length: int | None, limits: ServerLimits, body: bytes | bytearray
) -> ParsedRequest:
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise MalformedBodyError(f"The body has {count_of(len(body), 'byte')}, but {HEADER_LENGTH} is {end}.")
    request = read_request(body[:end] if end < len(body) else body, memoryview(body)[end:])
    options = merge_options(options, request.options)
    decode = build_request(request.tensors, options, limits)
    pixels = "pixels" in request.outputs
    image_format: OutputFormat = "raw" if pixels else options.format or IMAGE_FORMATS[0]
    return ParsedRequest(decode, image_format, InferResponse(request, decode.decoder))
