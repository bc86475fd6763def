"""The released decoders by name: network, latent space and intended output sizes (arXiv 2605.23902)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from engines.pid.config import PidConfig
from engines.pid.names import find_by_name
from engines.size import Size

SigmaFrame = Literal["flow", "variance-preserving"]


@dataclass(frozen=True)
class LatentStatistics:
    """Constants of an autoencoder by which its raw latents z are normalised, (z − shift) · scale.

    Each is one number for all channels, or one per channel.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...] = (0.0,)

    @classmethod
    def of_moments(cls, mean: tuple[float, ...], std: tuple[float, ...]) -> LatentStatistics:
        """Return the statistics of latents with this mean and standard deviation per channel."""
        return cls(tuple(1 / deviation for deviation in std), mean)

    def normalise(self, latents: Tensor) -> Tensor:
        """Return the normalised latents of raw ones, [..., c, h, w]."""
        scale, shift = (latents.new_tensor(values).view(-1, 1, 1) for values in (self.scale, self.shift))
        return (latents - shift) * scale


@dataclass(frozen=True)
class LatentSpace:
    """Latents that a decoder expects: normalised as in the diffusion model, not the raw latents of the autoencoder."""

    name: str
    channels: int
    pixels_per_cell: int  # pixels of the low-resolution image along one latent cell
    models: tuple[str, ...]  # diffusion models that use these latents, in one of their spellings
    normalisation: str  # formula from the raw latent z to the normalised one
    sigma_frame: SigmaFrame = "flow"  # x_t = (1−σ)x0 + σε, or √(1−σ²)x0 + σε
    statistics: LatentStatistics | None = None  # None if they are part of the autoencoder's weights


@dataclass(frozen=True)
class DecoderDescription:
    """Properties of a decoder that are known without its weights."""

    name: str
    config: PidConfig
    latent_space: LatentSpace
    sizes: tuple[Size, ...]  # intended output sizes in pixels, the most typical first
    max_side: int  # longest output side that it was trained for or is advertised for, in pixels
    aliases: tuple[str, ...] = ()
    empty_tokens: int | None = None  # length of the empty caption, if less than the maximum of the network


_AUTOENCODER_STATISTICS = "(z − mean) / std per channel, from the autoencoder's configuration"

_FLUX_MODELS = (
    *("flux", "flux.1", "flux.1-dev", "flux.1-schnell", "flux.1-krea-dev", "flux.1-kontext-dev"),
    *("flux-dev", "flux-schnell"),
    *("z-image", "z-image-turbo"),
    *("chroma", "chroma1-base", "chroma1-hd", "chroma1-flash"),
    *("boogu", "boogu-image", "boogu-image-0.1-base", "boogu-image-0.1-turbo", "boogu-image-0.1-edit"),
)
_FLUX2_MODELS = (
    *("flux.2", "flux.2-dev", "flux.2-klein", "flux.2-klein-4b", "flux.2-klein-9b"),
    *("flux.2-klein-base-4b", "flux.2-klein-base-9b"),
    *("ernie-image", "ernie-image-turbo"),
)
_SD3_MODELS = (
    *("sd3", "sd3-medium", "stable-diffusion-3", "stable-diffusion-3-medium"),
    *("sd3.5", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"),
    *("stable-diffusion-3.5", "stable-diffusion-3.5-medium", "stable-diffusion-3.5-large"),
    "stable-diffusion-3.5-large-turbo",
)
_SDXL_MODELS = (
    *("sdxl", "sdxl-1.0", "sdxl-base", "sdxl-base-1.0"),
    *("stable-diffusion-xl", "stable-diffusion-xl-base", "stable-diffusion-xl-base-1.0"),
)
_QWENIMAGE_MODELS = (
    *("qwen-image", "qwen-image-2512", "qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511"),
    *("krea-2", "krea-2-raw", "krea-2-turbo"),
)

# Of the autoencoder of Qwen-Image, which it shares with Wan 2.1.
# fmt: off
_QWENIMAGE_STATISTICS = LatentStatistics.of_moments(
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)
# fmt: on

LATENT_SPACES: dict[str, LatentSpace] = {
    space.name: space
    for space in (
        LatentSpace(
            "flux", 16, 8, _FLUX_MODELS, "0.3611 (z − 0.1159)", statistics=LatentStatistics((0.3611,), (0.1159,))
        ),
        LatentSpace(
            "flux2",
            128,
            16,
            _FLUX2_MODELS,
            "2×2 patchify, channel 4c + 2·row + column, then batch norm with the autoencoder's statistics, eps 1e-4",
        ),
        LatentSpace(
            "sd3", 16, 8, _SD3_MODELS, "1.5305 (z − 0.0609)", statistics=LatentStatistics((1.5305,), (0.0609,))
        ),
        LatentSpace("sdxl", 4, 8, _SDXL_MODELS, "0.13025 z", "variance-preserving", LatentStatistics((0.13025,))),
        LatentSpace("qwenimage", 16, 8, _QWENIMAGE_MODELS, _AUTOENCODER_STATISTICS, statistics=_QWENIMAGE_STATISTICS),
        LatentSpace("dinov2", 768, 16, ("dinov2", "rae"), _AUTOENCODER_STATISTICS),
        LatentSpace("siglip", 1152, 16, ("siglip", "scale-rae"), _AUTOENCODER_STATISTICS),
    )
}

_V1 = PidConfig()
_V15 = replace(
    _V1,
    adapter_width=1024,
    adapter_padding="replicate",
    gate_per_channel=False,
    pixel_injection=True,
    rope_reference=Size(2048, 2048),
)
_2K = (Size(2048, 2048), Size(2304, 1728), Size(1728, 2304), Size(2688, 1536), Size(1536, 2688))
_4K = (
    Size(3072, 3072),
    Size(3840, 2880),
    Size(2880, 3840),
    Size(3840, 2176),
    Size(2176, 3840),
    Size(4096, 4096),
)


def _describe(space_name: str, preset: str, *, upscale: int = 4, unpatchify: int = 1) -> DecoderDescription:
    space = LATENT_SPACES[space_name]
    config = replace(
        _V15 if preset.endswith("v1.5") else _V1,
        latent_channels=space.channels,
        pixels_per_cell=space.pixels_per_cell,
        upscale=upscale,
        latent_unpatchify=unpatchify,
    )
    large = preset.startswith("2kto4k")
    sizes = tuple(size for size in (_2K + _4K if large else _2K) if not any(side % config.cell_side for side in size))
    return DecoderDescription(f"{space_name}-{preset}", config, space, sizes, max_side=4096 if large else 2688)


def _with_aliases(decoders: tuple[DecoderDescription, ...]) -> dict[str, DecoderDescription]:
    """Add aliases: MODEL is the newest decoder for the latents of a model, MODEL-PRESET a specific one."""
    newest = {decoder.latent_space.name: decoder.name for decoder in decoders}  # the last one listed
    named = {}
    for decoder in decoders:
        space = decoder.latent_space
        preset = decoder.name.removeprefix(space.name)
        aliases = [model + preset for model in space.models if model + preset != decoder.name]
        if newest[space.name] == decoder.name:
            aliases += space.models
        named[decoder.name] = replace(decoder, aliases=tuple(aliases))
    return named


# Oldest first within a latent space.
_RELEASED = _with_aliases(
    (
        _describe("flux", "2k"),
        _describe("flux2", "2k"),
        _describe("sd3", "2k"),
        _describe("dinov2", "2k"),
        _describe("siglip", "2k", upscale=8),
        _describe("sd3", "2kto4k"),
        _describe("sdxl", "2kto4k"),
        _describe("flux", "2kto4k-v1.5"),
        _describe("flux2", "2kto4k-v1.5", unpatchify=2),
        _describe("qwenimage", "2kto4k-v1.5"),
    )
)


def released_names() -> tuple[str, ...]:
    """Return the names of the released decoders, without aliases."""
    return tuple(_RELEASED)


def released(name: str) -> DecoderDescription:
    """Look up a released decoder by name or alias, in any spelling.

    Raises:
        ConfigError: The name is unknown.
    """
    return find_description(name, _RELEASED.values())


def find_description(name: str, decoders: Iterable[DecoderDescription]) -> DecoderDescription:
    """Look up one of several decoders by name or alias, in any spelling.

    Raises:
        ConfigError: The name is unknown.
    """
    descriptions = {decoder.name: decoder for decoder in decoders}
    aliases = {alias: decoder for decoder in descriptions.values() for alias in decoder.aliases}
    return find_by_name(name, descriptions | aliases, tuple(descriptions))
