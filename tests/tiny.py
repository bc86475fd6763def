"""The smallest network with all its parts."""

from engines.pid import PidConfig

TINY = PidConfig(
    hidden_size=48,
    num_heads=3,
    patch_depth=2,
    pixel_depth=1,
    pixel_channels=4,
    pixel_attention_size=32,
    pixel_num_heads=2,
    caption_width=24,
    caption_tokens=12,
    adapter_width=16,
    adapter_depth=1,
)
