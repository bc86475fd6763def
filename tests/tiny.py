"""Configuration of a tiny network that has all parts, and a manifest for it."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from engines.manifest import Manifest
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.pid.toy import TOY
from engines.size import Size

TINY = replace(TOY.config, patch_depth=2, gate_per_channel=True, pixel_injection=False)


def manifest(**changes: Any) -> Manifest:
    """Return a valid manifest of the tiny network, with the given fields replaced."""
    fields: dict[str, Any] = {
        "decoder": "tiny",
        "latent_space": {"name": "flux", "channels": 16, "pixels_per_cell": 8, "sigma_frame": "flow"},
        "upscale": 4,
        "network": TINY,
        "target": "cpu",
        "precision": "fp32",
        "sizes": (Size(64, 96), Size(96, 64)),
        "max_batch": 2,
        "times": MODEL_TIMESTEPS,
        "origin": {"kind": "random", "seed": 7},
        "empty_caption": {"file": "caption.safetensors", "tokens": 5, "zeros": False},
        "verification": {
            "velocity_error": (0.0,) * len(MODEL_TIMESTEPS),
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
