"""A decode request after validation: tensors, options, and the limits they were checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from engines.size import Size
from server.images.formats import ImageFormat

PriorityName = Literal["interactive", "standard", "batch"]
MAX_DEADLINE_MS = 24 * 3600 * 1000
_DEADLINE = f"a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}"


class DecodeOptions(BaseModel):
    """What a client may choose; each description completes the sentence "The option … takes …"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sigma: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")] = 0.0
    """Noise level of the latent; 0 is a clean one."""
    seed: Annotated[int | None, Field(ge=0, lt=2**64, description="a whole number from 0 to 2^64 - 1")] = None
    """Seed of the decoder's noise; None lets the server draw one."""
    steps: Annotated[int, Field(ge=1, le=4, description="a whole number from 1 to 4")] = 4
    format: Annotated[ImageFormat | None, Field(description="png, webp or jpeg")] = None
    """Image format; None leaves it to the Accept header."""
    compression: Annotated[Literal["fast", "best", "none"], Field(description="fast, best or none")] = "fast"
    """Effort spent on a smaller PNG; other formats ignore it."""
    quality: Annotated[int, Field(ge=1, le=100, description="a whole number from 1 to 100")] = 90
    """Quality of WebP and JPEG; PNG ignores it."""
    metadata: Annotated[bool, Field(description="true or false")] = False
    """Whether a PNG carries the decode's settings as text chunks."""
    priority: Annotated[PriorityName, Field(description="interactive, standard or batch")] = "standard"
    """Class in which the image queues; the higher goes first as far as the others' deadlines allow."""
    deadline_ms: Annotated[int | None, Field(ge=1, le=MAX_DEADLINE_MS, description=_DEADLINE)] = None
    """Milliseconds from admission within which the image is due; None leaves it to the server's settings."""


@dataclass(frozen=True)
class DecoderLimits:
    """What this server's decoder takes."""

    channels: int
    latent_sizes: tuple[Size, ...]  # in latent cells
    pixels_per_cell: int  # output pixels along one side of a latent cell
    caption_tokens: int  # exactly this many in a caption; 0 means that it takes none
    caption_width: int
    max_batch: int  # images per request
    max_body: int  # bytes

    def output_size(self, latents: Sequence[int]) -> Size:
        """Return the size of the images decoded from latents of this shape, [..., h, w]."""
        return Size(latents[-2] * self.pixels_per_cell, latents[-1] * self.pixels_per_cell)


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    latents: torch.Tensor  # [B, c, h, w] float32, finite, contiguous, on the CPU
    captions: torch.Tensor | None  # [B, T, E] float32, finite; one caption for all is a view that repeats it
    options: DecodeOptions
