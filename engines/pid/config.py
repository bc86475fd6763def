"""Dimensions of a PiD network (arXiv 2605.23902)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engines.errors import ConfigError
from engines.size import MAX_SIDE, Size

Padding = Literal["zeros", "replicate"]

PATCH = 16  # side of a patch in output pixels; each patch is one token
PATCH_PIXELS = PATCH * PATCH
ROW_LIMIT = 3840  # pixel rows beyond this are outside the range that the position table was trained on

# Keys of published configurations that have no effect at inference.
_TRAINING_ONLY = {
    "repa_encoder_index",
    "zero_init_lq",
    "train_lq_proj_only",
    "lq_aux_rgb_head",
    "num_text_blocks",
    "pit_lq_gate_type",
}
# Keys that have the same value in every released decoder; the network supports no other value.
_FIXED: Mapping[str, Any] = {
    "in_channels": 3,
    "patch_size": PATCH,
    "use_text_rope": True,
    "text_rope_theta": 10000.0,
    "rope_mode": "ntk_aware",
    "lq_inject_mode": "controlnet",
    "lq_in_channels": 0,
    "enable_ed": False,
}
_GATES = {"sigma_aware_per_token_per_dim": True, "sigma_aware_per_token": False}
_FIELDS = {  # key of published configurations -> field of PidConfig
    "hidden_size": "hidden_size",
    "num_groups": "num_heads",
    "patch_depth": "patch_depth",
    "pixel_depth": "pixel_depth",
    "pixel_hidden_size": "pixel_channels",
    "pixel_attn_hidden_size": "pixel_attention_size",
    "pixel_num_groups": "pixel_num_heads",
    "txt_embed_dim": "caption_width",
    "txt_max_length": "caption_tokens",
    "lq_latent_channels": "latent_channels",
    "latent_spatial_down_factor": "pixels_per_cell",
    "sr_scale": "upscale",
    "lq_latent_unpatchify_factor": "latent_unpatchify",
    "lq_hidden_dim": "adapter_width",
    "lq_num_res_blocks": "adapter_depth",
    "lq_interval": "injection_interval",
    "lq_conv_padding_mode": "adapter_padding",
    "pit_lq_inject": "pixel_injection",
}

# Largest accepted dimensions, several times those of released decoders; the smallest is 1 for all of them.
_LIMITS: Mapping[str, int] = {
    "hidden_size": 16384,
    "num_heads": 256,
    "patch_depth": 256,
    "pixel_depth": 64,
    "pixel_channels": 256,
    "pixel_attention_size": 16384,
    "pixel_num_heads": 256,
    "caption_width": 65536,
    "caption_tokens": 4096,
    "latent_channels": 8192,
    "pixels_per_cell": 256,
    "upscale": 64,
    "latent_unpatchify": 16,
    "adapter_width": 16384,
    "adapter_depth": 256,
    "injection_interval": 256,
}


@dataclass(frozen=True)
class PidConfig:
    """Dimensions of one network; the defaults are those of the released v1 decoder for FLUX latents."""

    hidden_size: int = 1536
    num_heads: int = 24
    patch_depth: int = 14
    pixel_depth: int = 2
    pixel_channels: int = 16
    pixel_attention_size: int = 1152
    pixel_num_heads: int = 16
    caption_width: int = 2304
    caption_tokens: int = 300
    latent_channels: int = 16
    pixels_per_cell: int = 8  # pixels of the low-resolution image along one latent cell
    upscale: int = 4
    latent_unpatchify: int = 1  # side of the pixel shuffle that the adapter applies to packed latents
    adapter_width: int = 512
    adapter_depth: int = 4
    injection_interval: int = 2
    gate_per_channel: bool = True  # v1; v1.5 has one value per token
    adapter_padding: Padding = "zeros"
    pixel_injection: bool = False  # v1.5: the adapter also conditions the pixel blocks
    rope_reference: Size = Size(1024, 1024)

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(message)

        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            require(1 <= value <= limit, f"{name} must be from 1 to {limit:,}, got {value!s:.20}.")
        require(
            all(1 <= side <= MAX_SIDE for side in self.rope_reference),
            f"The sides of rope_reference must be from 1 to {MAX_SIDE:,}.",
        )
        require(self.head_width * self.num_heads == self.hidden_size, "hidden_size must be a multiple of num_heads.")
        require(
            self.pixel_head_width * self.pixel_num_heads == self.pixel_attention_size,
            "pixel_attention_size must be a multiple of pixel_num_heads.",
        )
        for width in (self.head_width, self.pixel_head_width):
            require(
                width % 4 == 0 and width > 4,
                f"The width of an attention head must be a multiple of 4 and at least 8, got {width}.",
            )
        require(self.pixel_channels % 4 == 0, "pixel_channels must be a multiple of 4.")
        require(self.adapter_width % 4 == 0, "adapter_width must be a multiple of 4, the number of norm groups.")
        require(
            self.latent_channels % self.latent_unpatchify**2 == 0,
            "latent_channels must be a multiple of latent_unpatchify².",
        )
        require(
            self.cell_side % (PATCH * self.latent_unpatchify) == 0,
            f"A latent cell must cover whole {PATCH}-pixel patches, got {self.cell_side} output pixels per cell.",
        )

    @property
    def head_width(self) -> int:
        """Channels per head of the patch blocks' attention."""
        return self.hidden_size // self.num_heads

    @property
    def pixel_head_width(self) -> int:
        """Channels per head of the pixel blocks' attention."""
        return self.pixel_attention_size // self.pixel_num_heads

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLP: two thirds of four times the hidden size."""
        return int(2 * (4 * self.hidden_size) / 3)

    @property
    def injections(self) -> int:
        """Number of patch blocks that adapter tokens are added before."""
        return -(-self.patch_depth // self.injection_interval)

    @property
    def token_sets(self) -> int:
        """Sets of tokens [L, D] that the adapter outputs: one per injection, and in v1.5 one for the pixel blocks."""
        return self.injections + self.pixel_injection

    @property
    def cell_side(self) -> int:
        """Output pixels along one latent cell."""
        return self.pixels_per_cell * self.upscale

    @property
    def adapter_upsample(self) -> int:
        """Tokens along one (unpacked) latent cell."""
        return self.cell_side // (PATCH * self.latent_unpatchify)

    def latent_size(self, size: Size) -> Size:
        """Return the size of the latent that decodes to an image of `size`.

        Raises:
            ConfigError: The sides of `size` are not multiples of `cell_side`, or exceed MAX_SIDE.
        """
        height, width = size
        if max(size) > MAX_SIDE:
            raise ConfigError(f"Output size {size} is not possible: sides may have at most {MAX_SIDE:,} pixels.")
        if height < 1 or width < 1 or height % self.cell_side or width % self.cell_side:
            raise ConfigError(f"Output size {size} is not possible: both sides must be multiples of {self.cell_side}.")
        return Size(height // self.cell_side, width // self.cell_side)

    @classmethod
    def from_published(cls, mapping: Mapping[str, Any]) -> PidConfig:
        """Read a configuration with the key names of the published model.

        Raises:
            ConfigError: A key is unknown or has a value that is not supported.
        """
        values = {key: value for key, value in mapping.items() if key not in _TRAINING_ONLY}
        for key, expected in _FIXED.items():
            if values.pop(key, expected) != expected:
                raise ConfigError(f"{key} = {mapping[key]!r} is not supported; expected {expected!r}.")
        gate = values.pop("lq_gate_type", "sigma_aware_per_token_per_dim")
        if gate not in _GATES:
            raise ConfigError(f"lq_gate_type = {gate!r} is not supported; expected {' or '.join(_GATES)}.")
        fields = {ours: values.pop(theirs) for theirs, ours in _FIELDS.items() if theirs in values}
        reference = Size(values.pop("rope_ref_h", 1024), values.pop("rope_ref_w", 1024))
        if values:
            raise ConfigError(f"Unknown configuration keys: {', '.join(sorted(values))}.")
        return cls(**fields, gate_per_channel=_GATES[gate], rope_reference=reference)
