"""From received bytes to a checked request: every input a client can get wrong is met here."""

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
    refuse_pickle,
)
from server.errors import BodyTooLargeError, InvalidLatentError, InvalidOptionError, MalformedBodyError
from server.request import DecodeRequest, DecoderLimits

Field: TypeAlias = tuple[str, object]


async def read_body(chunks: AsyncIterator[bytes], content_length: str | None, limit: int) -> bytearray:
    """Gather a body of at most `limit` bytes, however it is framed and whatever Content-Length claims.

    Raises:
        BodyTooLargeError: at once if Content-Length is over the limit, else with the first chunk that goes over it.
        MalformedBodyError: Content-Length is no number, or not the number of bytes received.
    """
    declared = None
    if content_length is not None:
        if not (content_length.isascii() and content_length.isdigit() and len(content_length) <= 20):
            raise MalformedBodyError("Content-Length is not a plain number of bytes; let your HTTP client write it.")
        declared = int(content_length)
        if declared > limit:
            raise _too_large(limit)
    body = bytearray()
    async for chunk in chunks:
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        body += chunk
    if declared is not None and declared != len(body):
        raise MalformedBodyError(f"The body has {len(body)} bytes, Content-Length says {declared}; send them alike.")
    return body


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"A body may have up to {limit} bytes; send fewer or smaller latents in a request.")


def parse_request(
    content_type: str | None, body: Buffer, query: list[tuple[str, str]], accepts: DecoderLimits
) -> DecodeRequest:
    """Read and check a decode request.

    The body is safetensors, .npy, raw little-endian elements (with `shape` and `dtype` among the options), JSON with
    base64, or a form with one of the first three in it. Options may stand in the query, in JSON and in form fields.

    Raises:
        BodyTooLargeError, UnsupportedMediaTypeError, MalformedBodyError: a body that cannot be read.
        InvalidLatentError, InvalidCaptionError, InvalidOptionError: a readable one that this server does not take.
    """
    if len(body) > accepts.max_body:
        raise _too_large(accepts.max_body)
    media_type, params = header_value(content_type or "")
    fields: list[Field] = list(query)
    if media_type == media.FORM:
        refuse_pickle(body)
        body = body if isinstance(body, bytes | bytearray) else bytes(body)
        media_type, body, form_fields = read_form(body, params.get("boundary", ""))
        fields += form_fields
    tensors, fields = _unpack(media_type, body, fields)
    if "latent" not in tensors:
        raise InvalidLatentError("The body holds no latent; send one under this name.")
    options = parse_options(fields)
    latents = _latents(tensors["latent"], accepts)
    captions = _captions(tensors["caption"], len(latents), accepts) if "caption" in tensors else None
    return DecodeRequest(latents, captions, options)


def _unpack(media_type: str, body: Buffer, fields: list[Field]) -> tuple[dict[str, RawTensor], list[Field]]:
    """The tensors in `body`, and the fields that are options."""
    if media_type == media.RAW:
        return _unpack_raw(body, fields)
    refuse_pickle(body)
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
            raise media.unsupported("The request names no Content-Type")
    raise media.unsupported(f"Content-Type {quote(media_type)} is not taken")


def _unpack_raw(body: Buffer, fields: list[Field]) -> tuple[dict[str, RawTensor], list[Field]]:
    given: dict[str, object] = {}
    for name in ("shape", "dtype"):
        values = {value for key, value in fields if key == name}
        if len(values) != 1:
            refuse_pickle(body)
            raise InvalidOptionError(f"Raw bytes need one option {name}; send shape=16,64,64 and dtype=float32, say.")
        given[name] = values.pop()
    try:
        shape = tuple(int(size) for size in str(given["shape"]).split(",", 8))
    except ValueError:
        raise InvalidOptionError(
            f"The option shape takes whole numbers such as 16,64,64, not {quote(given['shape'])}."
        ) from None
    latent = read_raw("latent", body, shape, str(given["dtype"]))
    return {"latent": latent}, [field for field in fields if field[0] not in given]


def _latents(packed: RawTensor, accepts: DecoderLimits) -> torch.Tensor:
    shape = packed.shape if len(packed.shape) == 4 else (1, *packed.shape)
    batch, channels, height, width = shape
    if channels != accepts.channels:
        takes = f"this decoder takes {accepts.channels}, as [{accepts.channels}, h, w] with or without a batch before"
        raise invalid("latent", f"has {quote(channels)} channels; {takes}")
    if not 1 <= batch <= accepts.max_batch:
        raise invalid("latent", f"is a batch of {quote(batch)}; send 1 to {accepts.max_batch} in a request")
    if (height, width) not in accepts.latent_sizes:
        by_distance = sorted(accepts.latent_sizes, key=lambda size: abs(size.height - height) + abs(size.width - width))
        scale = accepts.pixels_per_cell
        nearest = one_of(
            f"{size} (for {Size(size.height * scale, size.width * scale)} pixels)" for size in by_distance[:3]
        )
        raise invalid(
            "latent", f"is {quote(height)}x{quote(width)} (height x width); the nearest sizes taken are {nearest}"
        )
    return packed.to_float32().reshape(shape)  # [B, c, h, w]


def _captions(packed: RawTensor, batch: int, accepts: DecoderLimits) -> torch.Tensor:
    if accepts.caption_tokens == 0:
        raise invalid("caption", "is not wanted, this decoder takes none; leave it out")
    *batches, tokens, width = packed.shape
    if batches not in ([], [batch]):
        advice = f"send {batch}, one for each latent, or one without a batch for all"
        raise invalid("caption", f"is a batch of {quote(batches[0])}; {advice}")
    if (tokens, width) != (accepts.caption_tokens, accepts.caption_width):
        takes = f"exactly {accepts.caption_tokens} tokens, padding included, of width {accepts.caption_width}"
        raise invalid("caption", f"is {quote(tokens)} tokens of width {quote(width)}; this decoder takes {takes}")
    return packed.to_float32().expand(batch, -1, -1)  # [B, T, E]
