"""Arrays: npy files that NumPy reads, and planes of float16 from which the 8-bit values can be restored."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from server.images.arrays import FLOAT16, npy_header, planes

VALUES = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)  # each value three times


def test_numpy_reads_a_header_and_the_pixels():
    data = npy_header(VALUES.shape) + VALUES.tobytes()
    assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), VALUES)


def restored(values: torch.Tensor) -> np.ndarray:
    """Return 8-bit pixels [H, W, 3] of planes in [0, 1], as diffusers' VaeImageProcessor does."""
    return (values.permute(1, 2, 0).float().numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_signed_planes_give_back_every_pixel_value(dtype: torch.dtype):
    data = b"".join(planes(VALUES, "signed"))
    signed = torch.from_numpy(np.frombuffer(data, FLOAT16).copy()).reshape(3, 16, 16).to(dtype)
    assert (signed.min(), signed.max()) == (-1, 1)
    assert np.array_equal(restored((signed / 2 + 0.5).clamp(0, 1)), VALUES)


def test_unit_planes_give_back_every_pixel_value():
    data = b"".join(planes(VALUES, "unit"))
    unit = torch.from_numpy(np.frombuffer(data, FLOAT16).copy()).reshape(3, 16, 16)
    assert (unit.min(), unit.max()) == (0, 1)
    assert np.array_equal(restored(unit), VALUES)


def test_an_image_of_several_chunks_has_its_planes_in_order():
    pixels = np.random.default_rng(0).integers(0, 256, (700, 800, 3), dtype=np.uint8)
    chunks = list(planes(pixels, "unit"))
    assert len(chunks) > 3
    unit = np.frombuffer(b"".join(chunks), FLOAT16).reshape(3, 700, 800)
    assert np.array_equal((unit.astype(np.float32) * 255).round().transpose(1, 2, 0), pixels)
