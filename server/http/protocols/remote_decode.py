"""The protocol of diffusers' `remote_decode`, as diffusers 0.42 and SD.Next send it, and its older form in base64.

A request is one tensor. The query has its shape and dtype, and says whether it is normalised. The caller can set no
header, so that options of this server, such as the seed, are in the query of the endpoint's URL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engines.decoders import find_latent_space
from engines.pid.released import LatentStatistics
from server.body.headers import Fields, read_headers
from server.body.json_text import decode_base64, parse_json
from server.body.media import JSON, RAW, unsupported
from server.body.negotiation import negotiate
from server.body.options import merge_options
from server.body.parse import build_request
from server.body.prompts import check_prompts
from server.body.quoting import quote
from server.body.selection import candidates, select_decoder
from server.body.shapes import check_latent
from server.body.tensors import Buffer, check_size, plain_dtype, read_raw
from server.errors import InvalidLatentError, InvalidOptionError, MalformedBodyError
from server.http import openapi
from server.http.containers import BASE64_EXPANSION, base64_pieces
from server.http.layouts import Begun, Layout, SingleImage, Streams, chunks, complete, image_headers, iterate, seeds
from server.http.openapi import describe_decode, model_parameters, option_parameters, schema_ref
from server.http.protocols.base import Document, Head, OnePathProtocol, ParsedRequest
from server.http.protocols.remote_models import Parameters, RemoteBody, RemoteImages
from server.images.formats import ImageFormat, OutputFormat
from server.metrics import ProtocolName
from server.request import DecodeOptions, DecoderLimits, ServerLimits

BINARY, BASE64 = "tensor/binary", "tensor/base64"
_BODY_TYPES = (BINARY, BASE64, RAW, JSON, "")
_TOLERANCE = 1e-3  # relative; clients round these constants


@dataclass(frozen=True)
class _Request:
    """What is known about a request: its parameters and options, some of which the body may still add."""

    parameters: Parameters
    options: DecodeOptions
    accept: str | None

    def merged(self, fields: Iterable[tuple[str, object]]) -> _Request:
        """Add fields. Raises InvalidOptionError if one is unknown, invalid or contradicts another."""
        fields = list(fields)
        names = Parameters.model_fields
        parameters = merge_options(self.parameters, [field for field in fields if field[0] in names])
        options = merge_options(self.options, [field for field in fields if field[0] not in names])
        return _Request(parameters, options, self.accept)


@dataclass(frozen=True)
class _Plan:
    """What to do with the tensor of a request."""

    options: DecodeOptions  # with the name of the decoder
    shape: tuple[int, ...]
    dtype: str
    statistics: LatentStatistics | None  # with which it has to be normalised
    format: OutputFormat
    layout: Layout


class RemoteDecode(OnePathProtocol):
    """A raw or normalised tensor in; an image, or a tensor of pixels, out."""

    name: ProtocolName = "remote-decode"
    path = "/remote-decode"

    def documentation(self) -> Document:
        """Return the arguments that describe the route."""
        body = {JSON: {"schema": schema_ref(RemoteBody)}, RAW: openapi.BINARY}  # generators reject tensor/binary
        images = {
            "image/png": openapi.BINARY,
            "image/jpeg": openapi.BINARY,
            BINARY: openapi.BINARY,
            JSON: {"schema": schema_ref(RemoteImages)},
        }
        parameters = [*option_parameters(without=["preview"]), *model_parameters(Parameters)]
        summary, description = "Decode latents of diffusers' remote_decode", "One image, or all images as one tensor."
        return describe_decode("remote_decode", summary, body, parameters, images, description)

    def read_head(self, headers: Iterable[tuple[str, str]], query: Fields, limits: ServerLimits) -> Head:
        """Validate headers and query.

        Raises:
            UnsupportedMediaTypeError, BodyTooLargeError, MalformedBodyError: the body cannot be read.
            InvalidOptionError, InvalidLatentError: a parameter is invalid, or not supported by this decoder.
            NotAcceptableError: the Accept header allows nothing that this protocol can send.
        """
        values = read_headers(headers, limits)
        if values.media_type not in _BODY_TYPES:
            raise unsupported(f"Content-Type {quote(values.media_type)} is not supported", (BINARY, BASE64, JSON))
        request = _Request(Parameters(), DecodeOptions(), values.accept)
        request = request.merged([*_join_shape(query), *values.deadline])
        check_prompts(request.options, candidates(request.options, limits))
        if values.media_type in (JSON, BASE64):
            return Head(request.options, False, values.content_length, partial(_parse_json, request, limits))
        plan = _plan(request, limits)
        if values.content_length is not None:
            check_size("latent", plan.shape, plan.dtype, values.content_length)
        return Head(plan.options, True, values.content_length, partial(_parse_elements, plan, limits))


def _join_shape(query: Fields) -> list[tuple[str, object]]:
    """Return the fields of a query with one list in place of several fields named shape."""
    sizes = [value for name, value in query if name == "shape"]
    others: list[tuple[str, object]] = [field for field in query if field[0] != "shape"]
    return [*others, ("shape", sizes if len(sizes) > 1 else sizes[0])] if sizes else others


def _plan(request: _Request, limits: ServerLimits) -> _Plan:
    """Decide what to do, if a decoder supports the tensor and the response can be sent.

    SD.Next sends packed latents without the batch dimension. The factors of the normalisation help to find the decoder.
    """
    parameters = request.parameters
    for name in ("shape", "dtype"):
        if not getattr(parameters, name):
            raise InvalidOptionError(f"The parameter {name} of the tensor is missing; add it.")
    dtype = plain_dtype("latent", parameters.dtype)
    shape = parameters.shape if len(parameters.shape) != 2 else (1, *parameters.shape)
    decoder = select_decoder(shape, request.options, limits, partial(_check_factors, parameters))
    _check_factors(parameters, decoder)
    batch = check_latent(shape, request.options, decoder).batch
    options = request.options.model_copy(update={"decoder": decoder.name})
    return _Plan(options, shape, dtype, _missing_normalisation(parameters, decoder), *_representation(request, batch))


def _parse_elements(plan: _Plan, limits: ServerLimits, data: Buffer) -> ParsedRequest:
    """Read the elements of the tensor."""
    raw = read_raw("latent", data, plan.shape, plan.dtype)
    decode = build_request({"latent": raw}, plan.options, limits)
    if plan.statistics is not None:
        decode = replace(decode, latents=plan.statistics.normalise(decode.latents))
    return ParsedRequest(decode, plan.format, plan.layout)


def _parse_json(request: _Request, limits: ServerLimits, body: bytes | bytearray) -> ParsedRequest:
    """Read a body `{"inputs": base64, "parameters": {…}}`; the parameters may be in the query."""
    match parse_json(body):
        case {"inputs": str() | memoryview() as text, **rest} if set(rest) <= {"parameters"}:
            parameters: Any = rest.get("parameters") or {}
        case _:
            raise MalformedBodyError("Send an object with inputs (base64) and, optionally, parameters (an object).")
    if not isinstance(parameters, dict):
        raise MalformedBodyError("The member parameters must be an object.")
    try:
        data = decode_base64(text)
    except ValueError:
        raise MalformedBodyError("The member inputs is not valid base64.") from None
    request = request.merged(parameters.items())
    return _parse_elements(_plan(request, limits), limits, data)


def _missing_normalisation(parameters: Parameters, decoder: DecoderLimits) -> LatentStatistics | None:
    """Return the statistics with which a raw latent has to be normalised, or None if it is normalised already.

    Raises:
        InvalidLatentError: the latent is raw, but its statistics are part of the autoencoder's weights.
    """
    if parameters.scaling_factor is not None or parameters.do_scaling:
        return None
    statistics = _statistics(decoder)
    if statistics is None:
        raise InvalidLatentError(
            f"Raw latents of {decoder.latent_space} cannot be normalised here, because this needs the autoencoder; "
            "send normalised latents and do_scaling=true."
        )
    return statistics


def _statistics(decoder: DecoderLimits) -> LatentStatistics | None:
    space = find_latent_space(decoder.latent_space)
    return None if space is None else space.statistics


def _check_factors(parameters: Parameters, decoder: DecoderLimits) -> None:
    """Raise an InvalidOptionError if the factors of the normalisation are not those of the latent space."""
    statistics = _statistics(decoder)
    expected = (None, None) if statistics is None else (statistics.scale, statistics.shift)
    for name, value, known in zip(
        ("scaling_factor", "shift_factor"), (parameters.scaling_factor, parameters.shift_factor), expected, strict=True
    ):
        if value is None:
            continue
        if known is None or len(known) > 1:
            raise InvalidOptionError(
                f"The latent space {decoder.latent_space} of this decoder has no {name}; "
                "the request is for another one."
            )
        if not math.isclose(value, known[0], rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            raise InvalidOptionError(
                f"The {name} {value:g} belongs to another latent space: this decoder is for {decoder.latent_space}, "
                f"whose {name} is {known[0]:g}."
            )


def _representation(request: _Request, batch: int) -> tuple[OutputFormat, Layout]:
    """Return the format and the layout of the response.

    Raises:
        InvalidOptionError: the response would be one image, but the request has several.
        NotAcceptableError: the Accept header allows nothing that this protocol can send.
    """
    parameters, accept = request.parameters, (request.accept or "").lower()
    tensor = "tensor/" in accept or ("image/" not in accept and parameters.output_type == "pt")
    if tensor:
        base64 = BASE64 in accept or JSON in accept or parameters.output_tensor_type == "base64"
        if parameters.output_type == "pil":
            return "planes-unit", Tensor(base64)
        return "raw" if parameters.partial_postprocess else "planes-signed", Tensor(base64)
    if batch > 1:
        raise InvalidOptionError(f"output_type=pil is one image, but the request has {batch}; use output_type=pt.")
    image: ImageFormat = "png" if parameters.image_format == "png" else "jpeg"
    option = request.options.format or (None if "image/" in accept else image)
    return negotiate(option, request.accept, batch=False).format, SingleImage()


class Tensor(Layout):
    """The pixels of all images as one tensor, whose shape and dtype are in headers of these names, or in JSON."""

    def __init__(self, base64: bool) -> None:
        """Choose the raw elements or, with `base64`, a JSON object."""
        self._base64 = base64
        self.expansion = BASE64_EXPANSION if base64 else 1.0

    async def begin(self, streams: Streams, request_id: str) -> Begun:
        """Wait for the first bytes of the only image, or for all of several images."""
        first = streams[0]
        body = chunks(await first.chunk(), first)
        if len(streams) > 1 or self._base64:
            content = [chunk async for chunk in body]
            for stream in streams[1:]:
                content += await complete(stream)
            body = iterate(content)
        assert first.shape is not None  # noqa: S101  all formats of this layout are arrays
        shape = [len(streams), *first.shape]
        headers = image_headers(first) | {
            "X-Seed": seeds(streams),
            "shape": json.dumps(shape),
            "dtype": str(first.dtype),
        }
        if self._base64:
            return Begun(headers | {"Content-Type": JSON}, iterate(_json(content, shape, str(first.dtype))))
        length = sum(stream.content_length or 0 for stream in streams)
        return Begun(headers | {"Content-Type": BINARY, "Content-Length": str(length)}, body)


def _json(content: list[bytes], shape: list[int], dtype: str) -> Iterator[bytes]:
    yield b'{"inputs": "'
    yield from base64_pieces(content)
    yield b'", "parameters": ' + json.dumps({"shape": shape, "dtype": dtype}).encode() + b"}"
