"""Shapes of latents and captions that a decoder supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engines.errors import PidError
from engines.size import Size
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


def requested_size(options: DecodeOptions, limits: DecoderLimits) -> Size | None:
    """Return the latent size in cells for the options height and width, or None if both are missing.

    Raises:
        InvalidOptionError: one of them is missing, or this decoder does not support the size.
    """
    if options.height is None and options.width is None:
        return None
    if options.height is None or options.width is None:
        present, missing = ("width", "height") if options.height is None else ("height", "width")
        raise InvalidOptionError(f"The request has the option {present} but not {missing}; send both or none.")
    cell = limits.vae_pixels_per_cell
    for size in limits.latent_sizes:
        if (size.height * cell, size.width * cell) == (options.height, options.width):
            return size
    nearest = _nearest(options.height / cell, options.width / cell, limits)
    sizes = one_of(f"{_scale(size, cell)} (decoded to {limits.output_size(size)})" for size in nearest)
    raise InvalidOptionError(
        f"Height {options.height} and width {options.width} are not supported; the nearest sizes of the latent's image "
        f"before upscaling are {sizes}."
    )


def check_latent(shape: Sequence[int], options: DecodeOptions, limits: DecoderLimits) -> LatentShape:
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
    size = requested_size(options, limits)
    packed = _unpack(tuple(shape), size, limits) if size is not None and len(shape) == 3 else None
    latent = packed or _plain(shape, limits, size)
    if not 1 <= latent.batch <= limits.max_images:
        raise invalid("latent", f"is a batch of {quote(latent.batch)}; send 1 to {limits.max_images} per request")
    return latent


def read_latents(raw: RawTensor, options: DecodeOptions, limits: DecoderLimits) -> torch.Tensor:
    """Return the latents [B, c, h, w] float32, contiguous, if this decoder supports their shape.

    Raises:
        InvalidLatentError, InvalidOptionError: as `check_latent` and `RawTensor.to_float32`.
    """
    shape = check_latent(raw.shape, options, limits)
    return shape.arrange(raw.to_float32())  # [B, c, h, w]


def read_captions(raw: RawTensor, batch: int, limits: DecoderLimits) -> torch.Tensor:
    """Return the captions [B, T, E] float32, a single one expanded to the batch, if this decoder supports them."""
    if limits.caption_tokens == 0:
        raise invalid("caption", "is not supported by this decoder; omit it")
    *batches, tokens, width = raw.shape
    if batches not in ([], [batch]):
        advice = f"send {batch}, one per latent, or one without a batch dimension for all"
        raise invalid("caption", f"is a batch of {quote(batches[0])}; {advice}")
    if (tokens, width) != (limits.caption_tokens, limits.caption_width):
        found, needed = count_of(tokens, "token"), count_of(limits.caption_tokens, "token")
        advice = f"this decoder needs exactly {needed}, padding included, of width {limits.caption_width}"
        raise invalid("caption", f"has {found} of width {quote(width)}; {advice}")
    return raw.to_float32().expand(batch, -1, -1)  # [B, T, E]


def _unpack(shape: tuple[int, ...], size: Size, limits: DecoderLimits) -> LatentShape | None:
    """Return the shape of a packed latent of `size`, or None if a tensor of `shape` is not such a latent."""
    if shape == (limits.channels, *size):
        return None
    for side in _sides(size):
        if shape[1:] == _tokens(size, side, limits.channels):
            return LatentShape(shape[0], limits.channels, *size, side)
    return None


def _tokens(size: Size, side: int, channels: int) -> tuple[int, int]:
    """Return the number and width of tokens of `side` x `side` cells."""
    return size.area // side**2, channels * side**2


def _sides(size: Size) -> tuple[int, ...]:
    """Return the sides in cells of the squares into which a latent of `size` may be packed; the usual one first."""
    return (1,) if size.height % PACKING or size.width % PACKING else (PACKING, 1)


def _plain(shape: Sequence[int], limits: DecoderLimits, size: Size | None) -> LatentShape:
    """Return the shape of a latent that is not packed; if `size` is not None, it must have this size."""
    batch = 1 if len(shape) == 3 else shape[0]
    channels, (height, width) = shape[-3 if len(shape) < 5 else 1], shape[-2:]
    if size is not None and (channels, height, width) != (limits.channels, *size):
        raise invalid(
            "latent", f"has the shape {quote(tuple(shape))}; with this height and width, {_layouts(size, limits)}"
        )
    if channels != limits.channels:
        raise _wrong_channels(shape, channels, limits)
    if (height, width) not in limits.latent_sizes:
        nearest = one_of(f"{near} (for {limits.output_size(near)} pixels)" for near in _nearest(height, width, limits))
        raise invalid(
            "latent", f"has height {quote(height)} and width {quote(width)}; the nearest supported sizes are {nearest}"
        )
    return LatentShape(batch, channels, height, width)


def _layouts(size: Size, limits: DecoderLimits) -> str:
    """Return advice that lists the shapes of latents of `size`."""
    channels, (height, width) = limits.channels, size
    count, token = _tokens(size, _sides(size)[0], channels)
    plain = f"[{channels}, {height}, {width}], [batch, {channels}, {height}, {width}]"
    return f"send {plain} or packed [batch, {count}, {token}]"


def _wrong_channels(shape: Sequence[int], channels: int, limits: DecoderLimits) -> PidError:
    needed = limits.channels
    if len(shape) == 3 and 1 <= shape[0] <= limits.max_images and shape[2] in (needed, needed * PACKING**2):
        advice = "for packed latents, add the options height and width in pixels of the image before upscaling"
        return invalid("latent", f"has the shape {quote(tuple(shape))}; {advice}")
    layout = f"[{needed}, h, w] or [batch, {needed}, h, w]"
    return invalid("latent", f"has {count_of(channels, 'channel')}; this decoder needs {needed}, as {layout}")


def _nearest(height: float, width: float, limits: DecoderLimits) -> list[Size]:
    """Return the up to three supported latent sizes that are closest to a height and width in cells."""
    return sorted(limits.latent_sizes, key=lambda size: abs(size.height - height) + abs(size.width - width))[:3]


def _scale(size: Size, factor: int) -> Size:
    return Size(size.height * factor, size.width * factor)
