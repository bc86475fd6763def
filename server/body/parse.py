"""Parsing of received bodies into validated requests; all client input is validated here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeAlias

import torch

from engines.size import Size
from server.body import media
from server.body.forms import read_form
from server.body.media import header_value
from server.body.options import parse_options
from server.body.quoting import one_of, quote
from server.body.tensors import (
    LAYOUTS,
    Buffer,
    RawTensor,
    invalid,
    parse_json,
    read_base64,
    read_npy,
    read_raw,
    read_safetensors,
    reject_pickle,
)
from server.errors import BodyTooLargeError, InvalidLatentError, InvalidOptionError, MalformedBodyError
from server.request import DecodeRequest, DecoderLimits

Field: TypeAlias = tuple[str, object]  # name and value of an option, not validated yet


async def read_body(chunks: AsyncIterator[bytes], content_length: str | None, limit: int) -> bytearray:
    """Read a body of at most `limit` bytes, counting received bytes and not trusting Content-Length.

    Raises:
        BodyTooLargeError: Content-Length or the bytes received so far exceed the limit.
        MalformedBodyError: Content-Length is invalid or differs from the number of bytes received.
    """
    declared = None
    if content_length is not None:
        if not (content_length.isascii() and content_length.isdigit() and len(content_length) <= 20):
            raise MalformedBodyError("The Content-Length header is invalid; let your HTTP client write it.")
        declared = int(content_length)
        if declared > limit:
            raise _too_large(limit)
    body = bytearray()
    async for chunk in chunks:
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        body += chunk
    if declared is not None and declared != len(body):
        raise MalformedBodyError(f"The body has {len(body)} bytes but Content-Length is {declared}; they must match.")
    return body


def parse_request(
    content_type: str | None, body: Buffer, query: list[tuple[str, str]], limits: DecoderLimits
) -> DecodeRequest:
    """Parse and validate a decode request.

    The body is safetensors, .npy, raw little-endian elements (with `shape` and `dtype` in the query), JSON with base64,
    or a form with a file of the first three kinds. Options may be in the query, in JSON and in form fields.

    Raises:
        BodyTooLargeError, UnsupportedMediaTypeError, MalformedBodyError: the body cannot be read.
        InvalidLatentError, InvalidCaptionError, InvalidOptionError: it can, but the request is not valid here.
    """
    if len(body) > limits.max_body_bytes:
        raise _too_large(limits.max_body_bytes)
    media_type, params = header_value(content_type or "")
    fields: list[Field] = list(query)
    if media_type == media.FORM:
        reject_pickle(body)
        body = body if isinstance(body, bytes | bytearray) else bytes(body)
        media_type, body, form_fields = read_form(body, params.get("boundary", ""))
        fields += form_fields
    tensors, fields = _unpack(media_type, body, fields)
    if "latent" not in tensors:
        raise InvalidLatentError("The body has no tensor named 'latent'; add it.")
    options = parse_options(fields)
    latents = _latents(tensors["latent"], limits)
    captions = _captions(tensors["caption"], len(latents), limits) if "caption" in tensors else None
    return DecodeRequest(latents, captions, options)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body exceeds the limit of {limit} bytes; send fewer or smaller latents per request.")


def _unpack(media_type: str, body: Buffer, fields: list[Field]) -> tuple[dict[str, RawTensor], list[Field]]:
    """Return the tensors in `body`, and those fields and JSON members that are options."""
    if media_type == media.RAW:
        return _unpack_raw(body, fields)
    reject_pickle(body)
    match media_type:
        case media.SAFETENSORS:
            return read_safetensors(body), fields
        case media.NPY:
            return {"latent": read_npy(body)}, fields
        case media.JSON:
            members = parse_json(body)
            tensors = {name: read_base64(name, members.pop(name)) for name in LAYOUTS if name in members}
            return tensors, [*fields, *members.items()]
        case "":
            raise media.unsupported("The request has no Content-Type")
    raise media.unsupported(f"Content-Type {quote(media_type)} is not supported")


def _unpack_raw(body: Buffer, fields: list[Field]) -> tuple[dict[str, RawTensor], list[Field]]:
    """Unpack raw elements, whose shape and dtype are among `fields`."""
    layout: dict[str, object] = {}
    for name in ("shape", "dtype"):
        values = {value for key, value in fields if key == name}
        if len(values) != 1:
            reject_pickle(body)
            raise InvalidOptionError(
                f"Raw elements need exactly one option {name}; send, for example, shape=16,64,64 and dtype=float32."
            )
        layout[name] = values.pop()
    try:
        shape = tuple(int(size) for size in str(layout["shape"]).split(",", 8))
    except ValueError:
        raise InvalidOptionError(
            f"The option shape must be integers such as 16,64,64, not {quote(layout['shape'])}."
        ) from None
    latent = read_raw("latent", body, shape, str(layout["dtype"]))
    return {"latent": latent}, [field for field in fields if field[0] not in layout]


def _latents(raw: RawTensor, limits: DecoderLimits) -> torch.Tensor:
    """Return the latents [B, c, h, w] float32 if this decoder supports their shape."""
    shape = raw.shape if len(raw.shape) == 4 else (1, *raw.shape)
    batch, channels, height, width = shape
    if channels != limits.channels:
        layout = f"[{limits.channels}, h, w] or [batch, {limits.channels}, h, w]"
        raise invalid("latent", f"has {quote(channels)} channels; this decoder needs {limits.channels}, as {layout}")
    if not 1 <= batch <= limits.max_images:
        raise invalid("latent", f"is a batch of {quote(batch)}; send 1 to {limits.max_images} per request")
    if (height, width) not in limits.latent_sizes:
        nearest = _nearest_sizes(height, width, limits)
        raise invalid(
            "latent", f"has height {quote(height)} and width {quote(width)}; the nearest supported sizes are {nearest}"
        )
    return raw.to_float32().reshape(shape)  # [B, c, h, w]


def _nearest_sizes(height: int, width: int, limits: DecoderLimits) -> str:
    """List the up to three supported latent sizes that are closest to a height and width."""
    by_distance = sorted(limits.latent_sizes, key=lambda size: abs(size.height - height) + abs(size.width - width))
    scale = limits.pixels_per_cell
    return one_of(f"{size} (for {Size(size.height * scale, size.width * scale)} pixels)" for size in by_distance[:3])


def _captions(raw: RawTensor, batch: int, limits: DecoderLimits) -> torch.Tensor:
    """Return the captions [B, T, E] float32, a single one expanded to the batch, if this decoder supports them."""
    if limits.caption_tokens == 0:
        raise invalid("caption", "is not supported by this decoder; omit it")
    *batches, tokens, width = raw.shape
    if batches not in ([], [batch]):
        advice = f"send {batch}, one per latent, or one without a batch dimension for all"
        raise invalid("caption", f"is a batch of {quote(batches[0])}; {advice}")
    if (tokens, width) != (limits.caption_tokens, limits.caption_width):
        needed = f"exactly {limits.caption_tokens} tokens, padding included, of width {limits.caption_width}"
        raise invalid("caption", f"has {quote(tokens)} tokens of width {quote(width)}; this decoder needs {needed}")
    return raw.to_float32().expand(batch, -1, -1)  # [B, T, E]
