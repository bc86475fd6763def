"""Calibration: what the layers' inputs look like while latents are decoded, and the pictures that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.bundle import CAPTION_KEY
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, NoiseSource, PidConfig, sample
from engines.pid.config import PATCH_PIXELS
from engines.pid.sampler import MAX_STEPS
from engines.size import Size

LATENT_KEY, SIGMA_KEY = "latent", "sigma"  # tensors of a calibration file, besides CAPTION_KEY
MAX_SAMPLES = 64
SYNTHETIC_SAMPLES = 4
_SYNTHETIC_SIGMAS = (0.0, 0.0, 0.3, 0.6)
_CPU_TOKENS = 256  # of a calibration picture where no GPU is at hand: 256² pixels


@dataclass(frozen=True)
class CalibrationSample:
    source: str  # file name, or what made it
    latent: Tensor  # [c, h, w] float32
    sigma: float
    caption: Tensor | None  # [T, E] float32; None is the empty caption


@dataclass(frozen=True)
class Calibration:
    """The latents that stand for what the server will be sent."""

    samples: tuple[CalibrationSample, ...]
    description: str
    synthetic: bool


def load_calibration(folder: Path, config: PidConfig, caption_tokens: int) -> Calibration:
    """Every .safetensors file of a folder: `latent` [c, h, w], and if wanted `caption` [T, E] and a scalar `sigma`.

    Raises ConfigError, naming the file, on anything that this decoder does not take.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{folder} holds no .safetensors files to calibrate with.")
    samples = tuple(_load(path, config, caption_tokens) for path in paths[:MAX_SAMPLES])
    left = len(paths) - len(samples)
    more = f", the first of {len(paths)} by name" if left else ""
    return Calibration(samples, f"{len(samples)} latents of {folder.name}{more}", synthetic=False)


def synthetic_calibration(config: PidConfig) -> Calibration:
    """Made-up latents: noise with more power at low frequencies, of unit variance."""
    generator = torch.Generator().manual_seed(0)
    side = max(2, 256 // config.cell_side)

    def latent() -> Tensor:
        coarse = torch.randn(1, config.latent_channels, -(-side // 4), -(-side // 4), generator=generator)
        fine = torch.randn(1, config.latent_channels, side, side, generator=generator)
        return (0.8 * F.interpolate(coarse, (side, side), mode="nearest") + 0.6 * fine)[0]

    samples = tuple(CalibrationSample(f"synthetic {i}", latent(), s, None) for i, s in enumerate(_SYNTHETIC_SIGMAS))
    return Calibration(samples, f"{SYNTHETIC_SAMPLES} synthetic latents", synthetic=True)


def fit(calibration: Calibration, config: PidConfig, device: torch.device) -> Calibration:
    """The same with latents cropped about their middle to what a processor can decode; unchanged on a GPU."""
    if device.type != "cpu":
        return calibration
    side = max(1, int((_CPU_TOKENS * PATCH_PIXELS) ** 0.5) // config.cell_side)

    def crop(latent: Tensor) -> Tensor:
        top, left = (max(0, (length - side) // 2) for length in latent.shape[1:])
        return latent[:, top : top + side, left : left + side]

    return replace(calibration, samples=tuple(replace(s, latent=crop(s.latent)) for s in calibration.samples))


def output_size(latent: Tensor, config: PidConfig) -> Size:
    return Size(latent.shape[1] * config.cell_side, latent.shape[2] * config.cell_side)


@torch.inference_mode()
def decode(network: FoldedDecoder, one: CalibrationSample, empty_caption: Tensor, seed: int) -> Tensor:
    """The picture of a sample, [3, H, W] float32 on the CPU, in [-1, 1]; the same noise for the same seed."""
    device = network.y_pos_embedding.device
    caption = empty_caption if one.caption is None else one.caption
    size = output_size(one.latent, network.config)
    noise = NoiseSource(seed, "cpu")
    start, *steps = [noise.draw(size)[None].to(device) for _ in range(MAX_STEPS)]
    conditioning = network.condition(one.latent[None].to(device), caption[None].float().to(device), size)
    return sample(network, conditioning, start, one.sigma, steps)[0].clamp(-1, 1).cpu()


def calibrate(
    network: FoldedDecoder,
    calibration: Calibration,
    empty_caption: Tensor,
    layers: Sequence[str],
    progress: Callable[[str], None],
) -> tuple[dict[str, float], list[Tensor]]:
    """The largest |input| of each layer over all samples and steps, and the samples' pictures [3, H, W]."""
    pictures = []
    with _watched_inputs(network, layers) as largest:
        for seed, one in enumerate(calibration.samples):
            progress(f"latent {seed + 1} of {len(calibration.samples)}")
            pictures.append(decode(network, one, empty_caption, seed))
    return {layer: value.item() for layer, value in largest.items()}, pictures


@contextmanager
def _watched_inputs(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    largest: dict[str, Tensor] = {}

    def watch(layer: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            now = inputs[0].detach().abs().max()
            largest[layer] = torch.maximum(largest[layer], now) if layer in largest else now

        return network.get_submodule(layer).register_forward_pre_hook(hook)

    handles = [watch(layer) for layer in layers]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _load(path: Path, config: PidConfig, caption_tokens: int) -> CalibrationSample:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a safetensors file ({error}).") from error
    latent = tensors.get(LATENT_KEY)
    if latent is not None and latent.ndim == 4 and latent.shape[0] == 1:
        latent = latent[0]
    if latent is None or latent.ndim != 3 or latent.shape[0] != config.latent_channels:
        found = "none" if latent is None else list(latent.shape)
        raise ConfigError(f"{path} must hold a tensor latent [{config.latent_channels}, h, w], but holds {found}.")
    caption = tensors.get(CAPTION_KEY)
    expected = (caption_tokens, config.caption_width)
    if caption is not None and caption.shape != expected:
        raise ConfigError(f"caption in {path} has shape {list(caption.shape)}, this build takes {list(expected)}.")
    sigma = tensors.get(SIGMA_KEY, torch.zeros(()))
    if sigma.numel() != 1 or not 0 <= sigma.item() <= 1:
        raise ConfigError(f"sigma in {path} must be one number from 0 to 1.")
    for tensor in (latent, *([] if caption is None else [caption])):
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ConfigError(f"{path} must hold finite floating-point numbers.")
    return CalibrationSample(path.name, latent.float(), sigma.item(), None if caption is None else caption.float())
