"""The smallest decoder that has every part of the released ones, for tests and dry runs."""

from engines.pid.config import PidConfig
from engines.pid.released import LATENT_SPACES, DecoderDescription
from engines.size import Size

TOY = DecoderDescription(
    "toy",
    PidConfig(
        hidden_size=48,
        num_heads=3,
        patch_depth=3,
        pixel_depth=1,
        pixel_channels=4,
        pixel_attention_size=32,
        pixel_num_heads=2,
        caption_width=24,
        caption_tokens=12,
        adapter_width=16,
        adapter_depth=1,
        gate_per_channel=False,
        pixel_injection=True,
    ),
    LATENT_SPACES["flux"],
    sizes=(Size(64, 64), Size(64, 96)),
    max_side=96,
)
