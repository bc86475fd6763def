"""Parsing of received bodies into validated requests; all client input is validated here."""

from __future__ import annotations

from collections.abc import Mapping

from server.body import media
from server.body.detection import detect_format
from server.body.forms import read_form
from server.body.head import DecodeHead, read_layout, split_layout
from server.body.headers import Fields
from server.body.json_text import parse_json
from server.body.options import merge_options
from server.body.prompts import check_prompt_count, check_prompts, read_json_prompts
from server.body.selection import candidates, select_decoder
from server.body.shapes import read_captions, read_latents
from server.body.tensors import (
    LAYOUTS,
    Buffer,
    RawTensor,
    read_base64,
    read_npy,
    read_raw,
    read_safetensors,
    reject_pickle,
)
from server.errors import InvalidLatentError
from server.request import DecodeOptions, DecodeRequest, ServerLimits


def parse_body(head: DecodeHead, body: bytes | bytearray, limits: ServerLimits) -> DecodeRequest:
    """Parse and validate the body of a decode request.

    The body is safetensors, .npy, raw little-endian elements, JSON with base64, or a form with a file of the first
    three formats. JSON and forms may add options to those of the head. A file of undeclared format is recognised by its
    first bytes, or is raw elements if the request has a shape and dtype.

    Raises:
        UnsupportedMediaTypeError, MalformedBodyError: the body cannot be read.
        InvalidLatentError, InvalidCaptionError, InvalidOptionError, AmbiguousDecoderError: it can, but the request is
            not valid here.
    """
    return build_request(*_unpack(head, body), limits)


def build_request(tensors: Mapping[str, RawTensor], options: DecodeOptions, limits: ServerLimits) -> DecodeRequest:
    """Return the request for tensors named latent and caption.

    Raises:
        InvalidLatentError, InvalidCaptionError, InvalidOptionError, AmbiguousDecoderError: the request is not valid
            here.
    """
    check_prompts(options, candidates(options, limits))
    if "latent" not in tensors:
        raise InvalidLatentError("The body has no tensor named 'latent'; add it.")
    decoder = select_decoder(tensors["latent"].shape, options, limits)
    check_prompts(options, [decoder])
    latents = read_latents(tensors["latent"], options, decoder)
    check_prompt_count(options, len(latents), "caption" in tensors)
    captions = read_captions(tensors["caption"], len(latents), decoder) if "caption" in tensors else None
    return DecodeRequest(latents, captions, options, decoder.name)


def _unpack(head: DecodeHead, body: bytes | bytearray) -> tuple[dict[str, RawTensor], DecodeOptions]:
    """Return the tensors in `body`, and all options of the request."""
    if head.media_type == media.JSON:
        reject_pickle(body)
        members = parse_json(body)
        tensors = {name: read_base64(name, members.pop(name)) for name in LAYOUTS if name in members}
        if "prompt" in members:
            members["prompt"] = read_json_prompts(members["prompt"])
        return tensors, merge_options(head.options, members.items())
    if head.media_type == media.FORM:
        reject_pickle(body)
        media_type, data, fields = read_form(body, head.boundary)
        layout, fields = split_layout(media_type, [*head.layout, *fields])
        return _tensors(media_type, data, layout), merge_options(head.options, fields)
    return _tensors(head.media_type, body, head.layout), head.options


def _tensors(media_type: str | None, data: Buffer, layout: Fields) -> dict[str, RawTensor]:
    """Return the tensors in `data`; `layout` has the shape and dtype of raw elements."""
    if media_type is None:
        media_type = media.RAW if layout else detect_format(data)
    if media_type == media.RAW:
        return {"latent": read_raw("latent", data, *read_layout(layout))}
    reject_pickle(data)
    return read_safetensors(data) if media_type == media.SAFETENSORS else {"latent": read_npy(data)}
