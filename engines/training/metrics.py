"""Quality metrics of decoded images. Images are float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct
from engines.pid.config import PATCH
from engines.training.luma import to_ycbcr

FLAT = 2 / 127.5  # largest local standard deviation of luma in a flat area: 2 of 255 levels
_BOX = 5  # side in pixels of the box that is local


@dataclass(frozen=True)
class Measurement:
    """All metrics of decoded images; `psnr` is in dB."""

    psnr: float
    ssim: float
    sharpness: float
    chroma_noise: float
    grid: float


def measure(image: Tensor, reference: Tensor) -> Measurement:
    """Measure images against the originals."""
    return Measurement(
        psnr(image, reference),
        ssim(image, reference),
        sharpness(image, reference),
        chroma_noise(image, reference),
        grid(image),
    )


def low_resolution(latent: Tensor) -> Tensor:
    """Return the low-resolution image that the baselines upscale: [B, 16, h, w] -> [B, 3, 4h, 4w]."""
    return dct.decode(latent).clamp(-1, 1)


def bicubic(latent: Tensor) -> Tensor:
    """Return the baseline without a network, the inverse DCT upscaled: [B, 16, h, w] -> [B, 3, 16h, 16w]."""
    return F.interpolate(low_resolution(latent), scale_factor=dct.UPSCALE, mode="bicubic").clamp(-1, 1)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB: the mean over the images of the batch, which are clamped."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error)).mean().item()


def ssim(image: Tensor, reference: Tensor) -> float:
    """Return the structural similarity (Wang et al. 2004, Gaussian window), averaged over colours and batch."""
    from skimage.metrics import structural_similarity

    pairs = zip(image.cpu().numpy(), reference.cpu().numpy(), strict=True)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return sum(structural_similarity(*pair, channel_axis=0, data_range=2.0, **window) for pair in pairs) / len(image)


def gradient_energy(image: Tensor) -> float:
    """Return the mean square of the difference between neighbouring pixels."""
    return 0.5 * (image.diff(dim=2).square().mean() + image.diff(dim=3).square().mean()).item()


def sharpness(image: Tensor, reference: Tensor) -> float:
    """Return the gradient energy relative to the reference; 1 if equally sharp."""
    return gradient_energy(image) / gradient_energy(reference)


def chroma_noise(image: Tensor, reference: Tensor) -> float:
    """Return the high-pass energy of Cb and Cr in flat areas, relative to the reference; NaN if nothing is flat.

    High-pass is the difference from the mean of the 5×5 pixels around. A pixel belongs to a flat area if the standard
    deviation of the reference's luma over these pixels is at most `FLAT`. The energies of all images of the batch are
    added up before the division, so an image without any chroma noise does not make the ratio infinite. The threshold
    is the same for all images: a textured image contributes nothing, and a sky contributes all of its pixels.
    """
    luma = _ycbcr(reference)[:, :1]
    flat = _local_mean(luma.square()) - _local_mean(luma).square() <= FLAT**2  # [B, 1, H − 4, W − 4]
    return (_chroma_energy(image)[flat].sum() / _chroma_energy(reference)[flat].sum()).item()


def _chroma_energy(image: Tensor) -> Tensor:
    """Return the squared high-pass chroma of the pixels whose box is inside the image, [B, 1, H − 4, W − 4]."""
    chroma, margin = _ycbcr(image)[:, 1:], _BOX // 2
    inner = chroma[:, :, margin:-margin, margin:-margin]
    return (inner - _local_mean(chroma)).square().sum(dim=1, keepdim=True)


def _local_mean(values: Tensor) -> Tensor:
    return F.avg_pool2d(values, _BOX, stride=1)


def _ycbcr(image: Tensor) -> Tensor:
    """Convert RGB to YCbCr in float64, so that the variance of a smooth area is exact enough."""
    return to_ycbcr(image.double())


def grid(image: Tensor) -> float:
    """Return how visible the patch grid is; 1 if invisible.

    The value is the mean absolute difference between neighbours across patch borders, over that elsewhere.
    """
    columns = image.diff(dim=3).abs().mean(dim=(0, 1, 2))
    rows = image.diff(dim=2).abs().mean(dim=(0, 1, 3))
    steps = torch.cat((columns, rows))
    border = torch.cat([torch.arange(len(line)) % PATCH == PATCH - 1 for line in (columns, rows)])
    return (steps[border].mean() / steps[~border].mean()).item()
