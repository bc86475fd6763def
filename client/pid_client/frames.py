"""Conversions of latents, from the forms of pipelines and autoencoders to that of the decoders, in NumPy.

The functions accept NumPy arrays, tensors of PyTorch or JAX, and all else that `pid_client.tensors.to_tensor` accepts.
They return NumPy arrays: rearrangements keep float16 and float32, and widen bfloat16 to float32; arithmetic is done and
returned in float32. `height` and `width` are in pixels of the image that the pipeline's VAE would decode; they are
rounded down to whole tokens, as the pipelines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pid_client.tensors import to_tensor

Array = np.ndarray[Any, np.dtype[Any]]

PATCH = 2  # side in cells of the squares that pipelines pack into tokens or channels


def to_array(latent: object) -> Array:
    """Return a latent unchanged as a NumPy array, float16 or float32."""
    tensor = to_tensor(latent)
    return tensor.to_float32() if tensor.dtype == "bfloat16" else tensor.data


def unpack(tokens: object, height: int, width: int, pixels_per_cell: int = 8) -> Array:
    """Unpack tokens of 2×2 cells, those of FLUX.1 and Qwen-Image.

    Args:
        tokens: [B, n, 4c], in row-major order; channel 4·c + 2·row + column of a token belongs to channel c.
        height: Height of the VAE's image in pixels.
        width: Its width.
        pixels_per_cell: Pixels of that image along one latent cell.

    Returns:
        The latent [B, c, h, w].

    Raises:
        ValueError: The tokens are not those of an image of this size.
    """
    array = to_array(tokens)
    rows, columns = _grid(array, height, width, PATCH * pixels_per_cell)
    batch, _, size = array.shape
    if size % PATCH**2:
        raise ValueError(f"Tokens of 2×2 cells have a multiple of 4 values, but these have the shape {array.shape}.")
    patches = array.reshape(batch, rows, columns, size // PATCH**2, PATCH, PATCH)
    cells = patches.transpose(0, 3, 1, 4, 2, 5)  # [B, c, rows, 2, columns, 2]
    return np.ascontiguousarray(cells.reshape(batch, size // PATCH**2, rows * PATCH, columns * PATCH))


def unpack_cells(tokens: object, height: int, width: int, pixels_per_cell: int = 16) -> Array:
    """Unpack tokens of one cell each, those of FLUX.2.

    Args:
        tokens: [B, n, c], in row-major order.
        height: Height of the VAE's image in pixels.
        width: Its width.
        pixels_per_cell: Pixels of that image along one latent cell.

    Returns:
        The latent [B, c, h, w].

    Raises:
        ValueError: The tokens are not those of an image of this size.
    """
    array = to_array(tokens)
    rows, columns = _grid(array, height, width, pixels_per_cell)
    batch, _, channels = array.shape
    return np.ascontiguousarray(array.transpose(0, 2, 1).reshape(batch, channels, rows, columns))


def patchify(latent: object) -> Array:
    """Move squares of 2×2 cells into channels, [B, c, h, w] to [B, 4c, h/2, w/2].

    The value of channel c in row i and column j of a square becomes channel 4·c + 2·i + j. Raw latents of the
    autoencoder of FLUX.2 need this before `batch_norm`.

    Raises:
        ValueError: The latent is not [B, c, h, w] with even h and w.
    """
    array = to_array(latent)
    if array.ndim != 4 or array.shape[2] % PATCH or array.shape[3] % PATCH:
        raise ValueError(f"A latent [batch, c, h, w] with even h and w is needed, not the shape {array.shape}.")
    batch, channels, height, width = array.shape
    rows, columns = height // PATCH, width // PATCH
    squares = array.reshape(batch, channels, rows, PATCH, columns, PATCH).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(squares.reshape(batch, channels * PATCH**2, rows, columns))


def batch_norm(latent: object, mean: object, variance: object, eps: float = 1e-4) -> Array:
    """Normalise each channel with running statistics, (z − mean) / √(variance + eps).

    Args:
        latent: [B, c, h, w].
        mean: One value per channel; `vae.bn.running_mean` of FLUX.2.
        variance: One value per channel; `vae.bn.running_var` of FLUX.2.
        eps: `vae.config.batch_norm_eps` of FLUX.2.

    Raises:
        ValueError: The number of channels differs.
    """
    array = _float32(latent)
    centre, spread = _float32(mean).reshape(-1), _float32(variance).reshape(-1)
    if array.ndim != 4 or not array.shape[1] == centre.size == spread.size:
        raise ValueError(
            f"Statistics of {centre.size} and {spread.size} channels do not fit a latent of the shape {array.shape}; "
            "send [batch, c, h, w] and one mean and variance per channel."
        )
    per_channel = (1, -1, 1, 1)
    return (array - centre.reshape(per_channel)) / np.sqrt(spread.reshape(per_channel) + np.float32(eps))


def vp_from_euler(latent: object, sigma: float) -> tuple[Array, float]:
    """Convert a latent from the Euler frame x0 + σε to the variance-preserving frame of the SDXL decoder.

    Args:
        latent: Any shape.
        sigma: Noise level in the Euler frame, at least 0.

    Returns:
        The rescaled latent √(1−s²)·x0 + sε, and its noise level s from 0 to 1.

    Raises:
        ValueError: The noise level is negative or not finite.
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"A noise level in the Euler frame is finite and at least 0, not {sigma}.")
    scale = (sigma**2 + 1) ** -0.5
    return _float32(latent) * np.float32(scale), sigma * scale


def drop_frame(latent: object) -> Array:
    """Remove the time axis of a video of one frame, [B, c, 1, h, w] to [B, c, h, w].

    Raises:
        ValueError: The latent has another shape, or several frames.
    """
    array = to_array(latent)
    if array.ndim != 5 or array.shape[2] != 1:
        raise ValueError(f"A latent of one frame, [batch, c, 1, h, w], is needed, not the shape {array.shape}.")
    return array[:, :, 0]


@dataclass(frozen=True)
class _Statistics:
    """Constants of an autoencoder: z is normalised as (z − shift) · scale, with one value, or one per channel."""

    channels: int
    scale: Sequence[float]
    shift: Sequence[float] = (0.0,)


# The server has the same constants. They are repeated here because the client does not depend on it.
# fmt: off
_QWENIMAGE_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_QWENIMAGE_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
_STATISTICS = {
    "flux": _Statistics(16, (0.3611,), (0.1159,)),
    "sd3": _Statistics(16, (1.5305,), (0.0609,)),
    "sdxl": _Statistics(4, (0.13025,)),
    "qwenimage": _Statistics(16, tuple(1 / deviation for deviation in _QWENIMAGE_STD), _QWENIMAGE_MEAN),
}


def normalise(raw: object, latent_space: str) -> Array:
    """Normalise raw latents, as the encoder of an autoencoder writes them and its decoder reads them.

    Args:
        raw: [c, h, w] or [B, c, h, w].
        latent_space: "flux", "sd3", "sdxl" or "qwenimage". For FLUX.2, use `patchify` and `batch_norm`, whose
            statistics are part of the autoencoder's weights.

    Raises:
        ValueError: The constants of the latent space are not known, or the number of channels is wrong.
    """
    if latent_space not in _STATISTICS:
        known = ", ".join(_STATISTICS)
        raise ValueError(f"The constants of the latent space {latent_space!r} are not known, only those of {known}.")
    statistics = _STATISTICS[latent_space]
    array = _float32(raw)
    if array.ndim not in (3, 4) or array.shape[-3] != statistics.channels:
        channels = statistics.channels
        raise ValueError(
            f"A raw latent of {latent_space} is [{channels}, h, w] or [batch, {channels}, h, w], not {array.shape}."
        )
    scale, shift = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (statistics.scale, statistics.shift))
    return (array - shift) * scale


def _float32(value: object) -> Array:
    return to_tensor(value).to_float32()


def _grid(tokens: Array, height: int, width: int, pixels: int) -> tuple[int, int]:
    """Return the rows and columns of tokens that are `pixels` wide and high, if there are as many of them."""
    if tokens.ndim != 3:
        raise ValueError(f"Packed latents are [batch, tokens, values], not {tokens.shape}.")
    rows, columns = height // pixels, width // pixels
    if rows < 1 or columns < 1 or rows * columns != tokens.shape[1]:
        raise ValueError(
            f"An image of {height}×{width} pixels (height × width) has {rows * columns} tokens, but the latents have "
            f"{tokens.shape[1]}; pass the height and width that the pipeline used."
        )
    return rows, columns
