"""Calibration latents from the photo that ships with the project, for the bundled decoder."""

from __future__ import annotations

import numpy as np
import torch

from engines.bundled import dct
from engines.bundled.decoder import PHOTO, read_photo
from engines.compile.inputs.calibrate import Calibration, CalibrationSample
from engines.pid.config import PATCH

CROP = 256  # side in pixels
COUNT = 20


def photo_calibration() -> Calibration:
    """Make the latents of twenty crops: every second one is mirrored, every fifth latent is noised to sigma 0.3."""
    pixels = read_photo()  # [3, H, W]
    random = np.random.default_rng(0)
    limits = [(length - CROP) // PATCH + 1 for length in pixels.shape[1:]]
    samples = []
    for i in range(COUNT):
        top, left = (PATCH * random.integers(limit) for limit in limits)
        crop = pixels[:, top : top + CROP, left : left + CROP]
        latent = dct.encode(dct.downscale((crop.flip(2) if i % 2 else crop)[None]))[0]
        sigma = 0.3 if i % 5 == 4 else 0.0
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(i))
        samples.append(CalibrationSample(f"{PHOTO.name}, crop {i}", (1 - sigma) * latent + sigma * noise, sigma, None))
    return Calibration(tuple(samples), f"{COUNT} crops of the photo that ships with the project", synthetic=False)
