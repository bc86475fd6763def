"""The smallest network with all its parts, and what a bundle says of it."""

from datetime import UTC, datetime
from typing import Any

from engines.manifest import Manifest
from engines.pid import PidConfig
from engines.pid.sampler import CALL_TIMES

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


def manifest(**changes: Any) -> Manifest:
    """A manifest of it that is in order."""
    fields: dict[str, Any] = {
        "decoder": "tiny",
        "latent_space": {"name": "flux", "channels": 16, "pixels_per_cell": 8, "sigma_frame": "flow"},
        "upscale": 4,
        "network": TINY,
        "target": "cpu",
        "precision": "fp32",
        "sizes": ((64, 96), (96, 64)),
        "max_batch": 2,
        "times": CALL_TIMES,
        "origin": {"kind": "random", "seed": 7},
        "empty_caption": {"file": "caption.safetensors", "tokens": 5, "zeros": False},
        "verification": {
            "velocity_error": (0.0,) * len(CALL_TIMES),
            "max_velocity_error": 0.0,
            "precision_error": 0.0,
            "method": "none",
        },
        "created": datetime.now(UTC),
        "builder_version": "1",
        "torch_version": "2",
        "licence": "none",
    }
    return Manifest.model_validate({**fields, **changes})
