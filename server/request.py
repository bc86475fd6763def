"""A decode request after validation: tensors, options, and the limits they were checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from engines.captions.prompts import MAX_CHARACTERS
from engines.errors import NonFiniteImageError, PidError
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.tiles import tiles_of
from engines.size import Size
from server.errors import ExtremeValuesError
from server.images.formats import ALIASES, IMAGE_FORMATS, ImageFormat

PriorityName = Literal["interactive", "standard", "batch"]
MAX_MAGNITUDE = 1e12  # of a latent or caption; the sum of a hundred million squares still fits in float32
MAX_PLAUSIBLE_LATENT = 1e3  # normalised latents have values of about 1, and rarely of 10
MAX_PLAUSIBLE_CAPTION = 1e5  # language models have a few hidden values of some thousands
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_SIDE = 2**16  # pixels
_SIDE = f"an integer from 1 to {MAX_SIDE} (pixels)"
_DEADLINE = f"an integer from 1 to {MAX_DEADLINE_MS} (milliseconds)"
_FORMATS = f"{', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"


def _read_prompts(value: object) -> object:
    """Read one text, or a list of texts; other values are left to pydantic. Raises ValueError if the list is empty."""
    if value == []:
        raise ValueError("no prompts")
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _read_seed(value: int | None) -> int | None:
    """Read -1, with which many programs ask for a random seed."""
    return None if value == -1 else value


def _read_format(value: object) -> object:
    """Return the format that `value` is another name of, if it is one; other values are left to pydantic."""
    return ALIASES.get(value, value) if isinstance(value, str) else value


class DecodeOptions(BaseModel):
    """Options of a decode request; each description completes the sentence "The option … must be …"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    decoder: Annotated[str | None, Field(min_length=1, description="the name of a decoder of this server")] = None
    """Decoder of the latent; if None, the only one that supports the latent's shape."""
    sigma: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")] = 0.0
    """Noise level of the latent; 0 for a finished diffusion."""
    seed: Annotated[
        int | None,
        Field(ge=-1, lt=2**64, description="an integer from 0 to 2^64 - 1, or -1 (random)"),
        AfterValidator(_read_seed),
    ] = None
    """Seed of the decoder's noise; if None, the server draws one."""
    steps: Annotated[int, Field(ge=1, le=4, description="an integer from 1 to 4")] = 4
    """Number of denoising steps."""
    prompt: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(_read_prompts, json_schema_input_type=str | list[str] | None),
        Field(description=f"a text of at most {MAX_CHARACTERS:,} characters, or a list of them"),
    ] = None
    """Caption of the images as text: one for all, or one per image. If None, the captions of the body apply."""
    height: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description=_SIDE)] = None
    """Height of the VAE's image that the latent stands for, which packed latents need; with `width`."""
    width: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description=_SIDE)] = None
    """Width of the VAE's image that the latent stands for; with `height`."""
    format: Annotated[
        ImageFormat | None,
        BeforeValidator(_read_format, json_schema_input_type=ImageFormat | None),
        Field(description=_FORMATS),
    ] = None
    """Image format; if None, the Accept header decides."""
    tile: Annotated[Literal["auto", "never"], Field(description="auto or never")] = "auto"
    """Decode an image larger than the sizes of the decoder in tiles, or reject it."""
    compression: Annotated[Literal["fast", "best", "none"], Field(description="fast, best or none")] = "fast"
    """Compression effort for PNG; other formats ignore it."""
    quality: Annotated[int, Field(ge=1, le=100, description="an integer from 1 to 100")] = 90
    """Quality of WebP, JPEG and AVIF; other formats ignore it."""
    metadata: Annotated[bool, Field(description="true or false")] = False
    """Write the decode's settings into a PNG as text chunks."""
    preview: Annotated[Literal["none", "steps"], Field(description="none or steps")] = "none"
    """Send a small JPEG after each step, before the image; the Accept header can ask for it as well."""
    priority: Annotated[PriorityName, Field(description="interactive, standard or batch")] = "standard"
    """Scheduling class; a higher one goes first as long as lower ones still meet their deadlines."""
    deadline_ms: Annotated[int | None, Field(ge=1, le=MAX_DEADLINE_MS, description=_DEADLINE)] = None
    """Deadline in milliseconds from admission; if None, the server's setting applies."""


BODY_OVERHEAD = 2**16  # bytes of a body in addition to its tensors: headers, options, boundaries


@dataclass(frozen=True)
class DecoderLimits:
    """Latents, shapes and sizes that a decoder of this server supports."""

    name: str  # with which requests choose this decoder
    latent_space: str
    channels: int
    latent_sizes: tuple[Size, ...]  # in latent cells
    pixels_per_cell: int  # output pixels along one side of a latent cell
    upscale: int  # factor between the sides of the VAE's image and those of the output
    caption_tokens: int  # exact number of tokens in a caption; 0 if the decoder has no captions
    caption_width: int
    max_images: int  # per request
    max_pixels: int | None = None  # area of the largest image that is decoded in tiles; None: no image is
    accepts_prompts: bool = False  # whether the server can encode prompts for this decoder

    @property
    def vae_pixels_per_cell(self) -> int:
        """Pixels of the VAE's image along one side of a latent cell."""
        return self.pixels_per_cell // self.upscale

    @property
    def largest_body(self) -> int:
        """Bytes of the largest body that the decoder can use.

        That is float32 tensors in base64, prompts of which each character is escaped, and `BODY_OVERHEAD`.
        """
        areas = (size.area for size in self.latent_sizes)
        latent = self.channels * max(*areas, (self.max_pixels or 0) // self.pixels_per_cell**2)
        elements = latent + self.caption_tokens * self.caption_width
        prompts = 12 * MAX_CHARACTERS * self.max_images if self.accepts_prompts else 0
        return -(-4 * elements * self.max_images // 3) * 4 + prompts + BODY_OVERHEAD

    def supports_size(self, size: Size, options: DecodeOptions) -> bool:
        """Return whether the decoder supports latents of `size`, in cells."""
        if size in self.latent_sizes:
            return True
        if self.max_pixels is None or options.tile == "never" or min(size) < 1:
            return False
        sizes = [self._image(each) for each in self.latent_sizes]
        return tiles_of(self._image(size), sizes, self.pixels_per_cell, self.max_pixels) is not None

    def _image(self, cells: Size) -> Size:
        return Size(cells.height * self.pixels_per_cell, cells.width * self.pixels_per_cell)

    def supports(self, request: DecodeRequest) -> bool:
        """Return whether a request has a shape that the decoder supports."""
        captions = request.captions
        return (
            request.latents.shape[1] == self.channels
            and self.supports_size(Size(*request.latents.shape[2:]), request.options)
            and (captions is None or tuple(captions.shape[1:]) == (self.caption_tokens, self.caption_width))
            and (request.prompts is None or self.accepts_prompts)
        )

    def output_size(self, latents: Sequence[int]) -> Size:
        """Return the size of the images decoded from latents of this shape, [..., h, w]."""
        return self._image(Size(*latents[-2:]))


def decoder_limits(
    name: str, info: RuntimeInfo, sizes: Sequence[Size], max_images: int, has_text_encoder: bool = False
) -> DecoderLimits:
    """Return the limits of the decoder `name` for images of `sizes`."""
    return DecoderLimits(
        name=name,
        latent_space=info.latent_space,
        channels=info.latent_channels,
        latent_sizes=tuple(map(info.latent_size, sizes)),
        pixels_per_cell=info.pixels_per_cell * info.upscale,
        upscale=info.upscale,
        caption_tokens=info.caption_tokens,
        caption_width=info.caption_width,
        max_images=max_images,
        max_pixels=info.max_pixels,
        accepts_prompts=has_text_encoder and info.caption_tokens > 0,
    )


@dataclass(frozen=True)
class ServerLimits:
    """Decoders of this server, and limits that apply to the requests for all of them."""

    decoders: Mapping[str, DecoderLimits]  # by name, at least one
    max_body_bytes: int
    max_deadline_ms: int = MAX_DEADLINE_MS  # longer ones in the header X-Deadline-Ms are shortened


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """A validated request for a batch of B images."""

    latents: torch.Tensor  # [B, c, h, w] float32, finite, contiguous, on the CPU
    captions: torch.Tensor | None  # [B, T, E] float32, finite; one caption for all images is an expanded view
    options: DecodeOptions
    decoder: str  # name; one of `ServerLimits.decoders`

    @property
    def prompts(self) -> tuple[str, ...] | None:
        """The prompt of each image, or None if the request has none."""
        prompts = self.options.prompt
        return prompts * len(self.latents) if prompts is not None and len(prompts) == 1 else prompts


def explain_failure(sample: Sample, error: PidError) -> PidError:
    """Return `error`, or an ExtremeValuesError if it is a NaN in the image that extreme values in `sample` explain."""
    if not isinstance(error, NonFiniteImageError):
        return error
    for name, tensor, limit in (
        ("latent", sample.latent, MAX_PLAUSIBLE_LATENT),
        ("caption", sample.caption, MAX_PLAUSIBLE_CAPTION),
    ):
        if tensor is not None and (largest := float(tensor.abs().max())) > limit:
            return ExtremeValuesError(
                f"The decoder produced NaN or infinity from a {name} with values of magnitude {largest:.3g}; "
                "check that it is normalised."
            )
    return error
