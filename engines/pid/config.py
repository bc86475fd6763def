"""The dimensions of a PiD network (arXiv 2605.23902)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engines.errors import ConfigError
from engines.size import Size

Padding = Literal["zeros", "replicate"]

PATCH = 16  # side of a patch, in output pixels; one token each
PATCH_PIXELS = PATCH * PATCH
ROW_LIMIT = 3840  # pixel rows beyond this lie outside the trained range of the position table

# Keys of published configurations that do not change what an inference network computes.
_TRAINING_ONLY = {
    "repa_encoder_index",
    "zero_init_lq",
    "train_lq_proj_only",
    "lq_aux_rgb_head",
    "num_text_blocks",
    "pit_lq_gate_type",
}
# Keys with one value in every released decoder; another value would be another network.
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


@dataclass(frozen=True)
class PidConfig:
    """Dimensions of one network; the defaults are the released v1 decoder of the FLUX latent space."""

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
    latent_unpatchify: int = 1  # side of the packing that the adapter moves back to space
    adapter_width: int = 512
    adapter_depth: int = 4
    injection_interval: int = 2
    gate_per_channel: bool = True  # v1; a single value per token in v1.5
    adapter_padding: Padding = "zeros"
    pixel_injection: bool = False  # v1.5: the adapter also conditions the pixel blocks
    rope_reference: Size = Size(1024, 1024)

    def __post_init__(self) -> None:
        def require(condition: bool, sentence: str) -> None:
            if not condition:
                raise ConfigError(sentence)

        for name in ("hidden_size", "num_heads", "patch_depth", "pixel_depth", "pixel_channels", "latent_channels"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(self.head_width * self.num_heads == self.hidden_size, "hidden_size must be a multiple of num_heads.")
        require(
            self.pixel_head_width * self.pixel_num_heads == self.pixel_attention_size,
            "pixel_attention_size must be a multiple of pixel_num_heads.",
        )
        for width in (self.head_width, self.pixel_head_width):
            require(width % 4 == 0 and width > 4, f"Attention heads must be 8, 12, 16, … wide, got {width}.")
        require(self.pixel_channels % 4 == 0, "pixel_channels must be a multiple of 4.")
        require(self.adapter_width % 4 == 0, "adapter_width must be a multiple of 4, the adapter's norm groups.")
        require(
            self.latent_channels % self.latent_unpatchify**2 == 0,
            "latent_channels must hold whole latent_unpatchify × latent_unpatchify packings.",
        )
        require(
            self.cell_side % (PATCH * self.latent_unpatchify) == 0,
            f"A latent cell must cover whole {PATCH}-pixel patches, got {self.cell_side} output pixels a cell.",
        )

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def pixel_head_width(self) -> int:
        return self.pixel_attention_size // self.pixel_num_heads

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLP: two thirds of four times the hidden size."""
        return int(2 * (4 * self.hidden_size) / 3)

    @property
    def injections(self) -> int:
        return -(-self.patch_depth // self.injection_interval)

    @property
    def token_sets(self) -> int:
        """Sets of tokens [L, D] that the adapter makes: one an injection, and in v1.5 one for the pixel blocks."""
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
        """Latent (h, w) that decodes to `size` pixels. Raises ConfigError where there is none."""
        height, width = size
        if height < 1 or width < 1 or height % self.cell_side or width % self.cell_side:
            raise ConfigError(f"An output of {size} is not possible: both sides must be multiples of {self.cell_side}.")
        return Size(height // self.cell_side, width // self.cell_side)

    @classmethod
    def from_published(cls, mapping: Mapping[str, Any]) -> PidConfig:
        """Read a configuration in the published model's own key names. Raises ConfigError on anything unsupported."""
        values = {key: value for key, value in mapping.items() if key not in _TRAINING_ONLY}
        for key, expected in _FIXED.items():
            if values.pop(key, expected) != expected:
                raise ConfigError(f"{key} = {mapping[key]!r} is not supported; PiD decoders have {expected!r}.")
        gate = values.pop("lq_gate_type", "sigma_aware_per_token_per_dim")
        if gate not in _GATES:
            raise ConfigError(f"lq_gate_type = {gate!r} is not supported; known are {', '.join(_GATES)}.")
        fields = {ours: values.pop(theirs) for theirs, ours in _PUBLISHED.items() if theirs in values}
        reference = Size(values.pop("rope_ref_h", 1024), values.pop("rope_ref_w", 1024))
        if values:
            raise ConfigError(f"Unknown configuration keys: {', '.join(sorted(values))}.")
        return cls(**fields, gate_per_channel=_GATES[gate], rope_reference=reference)


_PUBLISHED = {
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
