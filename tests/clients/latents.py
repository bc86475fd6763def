"""A latent for the bundled decoder, and its images as the reference that clients must receive."""

from __future__ import annotations

import io
from base64 import b64encode

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

LATENT = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0)).half()
RAW = LATENT.numpy().tobytes()
RAW_QUERY = "shape=16,16,16&dtype=float16"
JSON_TENSOR = {"data": b64encode(RAW).decode(), "shape": list(LATENT.shape), "dtype": "float16"}


def decode(url: str, latent: torch.Tensor, caption: torch.Tensor | None = None, **options: object) -> bytes:
    """Return the PNG of a latent [c, h, w] from `POST /decode`."""
    tensors = {"latent": latent} if caption is None else {"latent": latent, "caption": caption}
    headers = {"Content-Type": "application/x-safetensors"}
    response = httpx.post(f"{url}/decode", content=save(tensors), headers=headers, params=options, timeout=60)
    assert response.status_code == 200, response.text
    return response.content


def pixels(image: bytes) -> np.ndarray:
    """Return an encoded image as [H, W, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
