"""Prompts of a decode request: whether this server and decoder can use them."""

from __future__ import annotations

from collections.abc import Sequence

from engines.captions.prompts import MAX_CHARACTERS, prompt_fault
from server.body.json_text import decode_text
from server.errors import InvalidOptionError, count_of
from server.request import DecodeOptions, DecoderLimits

MAX_JSON_BYTES = 12 * MAX_CHARACTERS  # a character takes at most two escape sequences of six bytes


def read_json_prompts(value: object) -> object:
    """Decode the long texts of the option prompt, one or a list, that `parse_json` returned undecoded.

    Raises:
        InvalidOptionError: a text is far too long.
        MalformedBodyError: a text is not a JSON string.
    """
    if isinstance(value, list):
        return [read_json_prompts(item) if isinstance(item, memoryview) else item for item in value]
    if not isinstance(value, memoryview):
        return value
    if len(value) > MAX_JSON_BYTES:
        raise prompt_too_long()
    return decode_text(value)


def prompt_too_long() -> InvalidOptionError:
    """Return the error for a prompt that was not decoded because of its size."""
    return InvalidOptionError(f"The prompt has more than the {MAX_CHARACTERS:,} characters of the limit.")


def check_prompts(options: DecodeOptions, decoders: Sequence[DecoderLimits]) -> None:
    """Raise an InvalidOptionError if the request has prompts that the server can encode for none of `decoders`."""
    if options.prompt is None:
        return
    if not any(decoder.caption_tokens for decoder in decoders):
        raise InvalidOptionError(
            f"{', '.join(decoder.name for decoder in decoders)}: no captions are supported; omit the option prompt."
        )
    if not any(decoder.accepts_prompts for decoder in decoders):
        raise InvalidOptionError(
            "This server has no text encoder, so it cannot use the option prompt; start it with --text-encoder, "
            "or send the embedding as the tensor 'caption'."
        )
    max_images = max(decoder.max_images for decoder in decoders)
    if len(options.prompt) > max_images:
        raise InvalidOptionError(
            f"The request has {count_of(len(options.prompt), 'prompt')}; a request has at most "
            f"{count_of(max_images, 'image')}."
        )
    for prompt in options.prompt:
        if fault := prompt_fault(prompt):
            raise InvalidOptionError(f"The prompt {fault}.")


def check_prompt_count(options: DecodeOptions, images: int, has_caption: bool) -> None:
    """Raise an InvalidOptionError unless the prompts, if any, fit a request of `images` images."""
    if options.prompt is None:
        return
    if has_caption:
        raise InvalidOptionError("The request has both a prompt and a tensor 'caption'; send one of them.")
    if len(options.prompt) not in (1, images):
        raise InvalidOptionError(
            f"The request has {count_of(len(options.prompt), 'prompt')} for {count_of(images, 'image')}; "
            "send one, or one per image."
        )
