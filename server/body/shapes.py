"""Shapes of latents and captions that a decoder supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engines.errors import PidError
from engines.size import MAX_SIDE, Size
from server.body.quoting import one_of, quote
from server.body.tensors import RawTensor, check_rank, invalid
from server.errors import InvalidOptionError, count_of
from server.request import DecodeOptions, DecoderLimits

PACKING = 2  # side in cells of the squares that pipelines pack into tokens


@dataclass(frozen=True)
class LatentShape:
    """The shape [B, c, h, w] of a latent, and the arrangement of its values in the tensor of the body."""

    batch: int
    channels: int
    height: int  # cells
    width: int
    patch: int | None = None  # side in cells of the square in each token of a packed latent

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the tensor in the body as [B, c, h, w], contiguous.

        A packed latent is [B, n, c·p·p] for squares of p x p cells, which are in row-major order, as are the cells of a
        square: its channel index is (c·p + row)·p + column.
        """
        shape = (self.batch, self.channels, self.height, self.width)
        if self.patch is None:
            return values.reshape(shape)
        side = self.patch
        rows, columns = self.height // side, self.width // side
        patches = values.reshape(self.batch, rows, columns, self.channels, side, side)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape).contiguous()


def requested_size(options: DecodeOptions, decoder: DecoderLimits) -> Size | None:
    """Return the latent size in cells for the options height and width, or None if both are missing.

    Raises:
        InvalidOptionError: one of them is missing, or this decoder does not support the size.
    """
    if options.height is None and options.width is None:
        return None
    if options.height is None or options.width is None:
        present, missing = ("width", "height") if options.height is None else ("height", "width")
        raise InvalidOptionError(f"The request has the option {present} but not {missing}; send both or none.")
    cell = decoder.vae_pixels_per_cell
    size = Size(options.height // cell, options.width // cell)
    if _scale(size, cell) == (options.height, options.width) and decoder.supports_size(size, options):
        return size
    nearest = _nearest(options.height / cell, options.width / cell, decoder)
    sizes = one_of(f"{_scale(size, cell)} (decoded to {decoder.output_size(size)})" for size in nearest)
    raise InvalidOptionError(
        f"Height {options.height} and width {options.width} are not supported; the nearest sizes of the latent's image "
        f"before upscaling are {sizes}{_larger(decoder, options)}."
    )


def check_latent(shape: Sequence[int], options: DecodeOptions, decoder: DecoderLimits) -> LatentShape:
    """Return the shape of a latent with its batch dimension.

    A latent is [c, h, w], [B, c, h, w] or, from pipelines for video, [B, c, 1, h, w]. With the options height and width
    it may also be packed into tokens of 2 x 2 cells, [B, n, 4c], or of single cells, [B, n, c].

    Raises:
        InvalidLatentError: this decoder does not support it, or height and width do not agree with it.
        InvalidOptionError: as `requested_size`.
    """
    check_rank("latent", shape)
    if len(shape) == 5 and shape[2] != 1:
        raise invalid("latent", f"has {count_of(shape[2], 'frame')}; send single images, as [batch, channels, 1, h, w]")
    size = requested_size(options, decoder)
    packed = _unpack(tuple(shape), size, decoder) if size is not None and len(shape) == 3 else None
    latent = packed or _plain(shape, options, decoder, size)
    if not 1 <= latent.batch <= decoder.max_images:
        raise invalid("latent", f"is a batch of {quote(latent.batch)}; send 1 to {decoder.max_images} per request")
    return latent


def read_latents(raw: RawTensor, options: DecodeOptions, decoder: DecoderLimits) -> torch.Tensor:
    """Return the latents [B, c, h, w] float32, contiguous, if this decoder supports their shape.

    Raises:
        InvalidLatentError, InvalidOptionError: as `check_latent` and `RawTensor.to_float32`.
    """
    shape = check_latent(raw.shape, options, decoder)
    return shape.arrange(raw.to_float32())  # [B, c, h, w]


def read_captions(raw: RawTensor, batch: int, decoder: DecoderLimits) -> torch.Tensor:
    """Return the captions [B, T, E] float32, a single one expanded to the batch, if this decoder supports them."""
    if decoder.caption_tokens == 0:
        raise invalid("caption", "is not supported by this decoder; omit it")
    *batches, tokens, width = raw.shape
    if batches not in ([], [batch]):
        advice = f"send {batch}, one per latent, or one without a batch dimension for all"
        raise invalid("caption", f"is a batch of {quote(batches[0])}; {advice}")
    if (tokens, width) != (decoder.caption_tokens, decoder.caption_width):
        found, needed = count_of(tokens, "token"), count_of(decoder.caption_tokens, "token")
        advice = f"this decoder needs exactly {needed}, padding included, of width {decoder.caption_width}"
        raise invalid("caption", f"has {found} of width {quote(width)}; {advice}")
    return raw.to_float32().expand(batch, -1, -1)  # [B, T, E]


def channels_of(shape: Sequence[int]) -> int:
    """Return the channels of a latent of three to five dimensions that is not packed."""
    return shape[-3 if len(shape) < 5 else 1]


def _unpack(shape: tuple[int, ...], size: Size, decoder: DecoderLimits) -> LatentShape | None:
    """Return the shape of a packed latent of `size`, or None if a tensor of `shape` is not such a latent."""
    if shape == (decoder.channels, *size):
        return None
    for side in _sides(size):
        if shape[1:] == _tokens(size, side, decoder.channels):
            return LatentShape(shape[0], decoder.channels, *size, side)
    return None


def _tokens(size: Size, side: int, channels: int) -> tuple[int, int]:
    """Return the number and width of tokens of `side` x `side` cells."""
    return size.area // side**2, channels * side**2


def _sides(size: Size) -> tuple[int, ...]:
    """Return the sides in cells of the squares into which a latent of `size` may be packed; the usual one first."""
    return (1,) if size.height % PACKING or size.width % PACKING else (PACKING, 1)


def _plain(shape: Sequence[int], options: DecodeOptions, decoder: DecoderLimits, size: Size | None) -> LatentShape:
    """Return the shape of a latent that is not packed; if `size` is not None, it must have this size."""
    batch = 1 if len(shape) == 3 else shape[0]
    channels, (height, width) = channels_of(shape), shape[-2:]
    if size is not None and (channels, height, width) != (decoder.channels, *size):
        raise invalid(
            "latent", f"has the shape {quote(tuple(shape))}; with this height and width, {_layouts(size, decoder)}"
        )
    if channels != decoder.channels:
        raise _wrong_channels(shape, channels, decoder)
    if not decoder.supports_size(Size(height, width), options):
        nearest = one_of(
            f"{near} (for {decoder.output_size(near)} pixels)" for near in _nearest(height, width, decoder)
        )
        raise invalid(
            "latent",
            f"has height {quote(height)} and width {quote(width)}; the nearest supported sizes are {nearest}"
            f"{_larger(decoder, options)}",
        )
    return LatentShape(batch, channels, height, width)


def _layouts(size: Size, decoder: DecoderLimits) -> str:
    """Return advice that lists the shapes of latents of `size`."""
    channels, (height, width) = decoder.channels, size
    count, token = _tokens(size, _sides(size)[0], channels)
    plain = f"[{channels}, {height}, {width}], [batch, {channels}, {height}, {width}]"
    return f"send {plain} or packed [batch, {count}, {token}]"


def _wrong_channels(shape: Sequence[int], channels: int, decoder: DecoderLimits) -> PidError:
    needed = decoder.channels
    if len(shape) == 3 and 1 <= shape[0] <= decoder.max_images and shape[2] in (needed, needed * PACKING**2):
        advice = "for packed latents, add the options height and width in pixels of the image before upscaling"
        return invalid("latent", f"has the shape {quote(tuple(shape))}; {advice}")
    layout = f"[{needed}, h, w] or [batch, {needed}, h, w]"
    return invalid("latent", f"has {count_of(channels, 'channel')}; this decoder needs {needed}, as {layout}")


def _larger(decoder: DecoderLimits, options: DecodeOptions) -> str:
    """Return advice on images that are larger than the sizes of the decoder."""
    if decoder.max_pixels is None or options.tile == "never":
        return ""
    return (
        f". Larger images have at most {decoder.max_pixels:,} pixels and {MAX_SIDE:,} per side, "
        "and are at least as high and as wide as one of the sizes"
    )


def _nearest(height: float, width: float, decoder: DecoderLimits) -> list[Size]:
    """Return the up to three supported latent sizes that are closest to a height and width in cells."""
    return sorted(decoder.latent_sizes, key=lambda size: abs(size.height - height) + abs(size.width - width))[:3]


def _scale(size: Size, factor: int) -> Size:
    return Size(size.height * factor, size.width * factor)
