"""Calibration: decodes latents to record the ranges of layers and attentions, and the images to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.bundle import CAPTION_KEY
from engines.compile.inputs.tensor_files import is_finite, load_tensors
from engines.compile.verify_fold import VerificationError
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, NoiseSource, PidConfig, sample
from engines.pid.blocks import AttentionKernel, attentions
from engines.pid.config import PATCH_PIXELS
from engines.pid.fp8_attention import AttentionRange
from engines.pid.sampler import MAX_STEPS
from engines.size import Size

LATENT_KEY, SIGMA_KEY = "latent", "sigma"  # tensors of a calibration file, in addition to CAPTION_KEY
MAX_SAMPLES = 64
SYNTHETIC_SIGMAS = (0.0, 0.0, 0.3, 0.6)  # one synthetic latent each
_PATTERN = "*.safetensors"
_CPU_TOKENS = 256  # size limit of calibration images without a GPU: 256² pixels


@dataclass(frozen=True)
class CalibrationSample:
    """A latent to calibrate with."""

    source: str  # file name, or a description
    latent: Tensor  # [c, h, w] float32
    sigma: float
    caption: Tensor | None  # [T, E] float32; None: the empty caption


@dataclass(frozen=True)
class Calibration:
    """Latents that represent the requests to expect."""

    samples: tuple[CalibrationSample, ...]
    description: str
    synthetic: bool


@dataclass(frozen=True)
class Ranges:
    """Largest magnitudes over all samples and steps."""

    inputs: Mapping[str, float]  # layer name -> largest |input|
    attentions: Mapping[str, AttentionRange]  # attention name -> its queries, keys and values


def load_calibration(folder: Path, config: PidConfig, caption_tokens: int) -> Calibration:
    """Load the .safetensors files of a directory, at most MAX_SAMPLES in the order of their names.

    Each file holds a tensor `latent` [c, h, w], and optionally a `caption` [T, E] and a scalar `sigma`.

    Raises:
        ConfigError: There are no files, or one of them does not match the decoder.
    """
    paths = calibration_files(folder)
    if not paths:
        raise ConfigError(f"The calibration directory {folder} contains no .safetensors files.")
    samples = tuple(_load_sample(path, config, caption_tokens) for path in paths)
    count = len(list(folder.glob(_PATTERN)))
    omitted = f", the first of {count} by name" if count > len(samples) else ""
    return Calibration(samples, f"{len(samples)} latents from {folder.name}{omitted}", synthetic=False)


def calibration_files(folder: Path) -> list[Path]:
    """List the files that `load_calibration` reads."""
    return sorted(folder.glob(_PATTERN))[:MAX_SAMPLES]


def synthetic_calibration(config: PidConfig) -> Calibration:
    """Make synthetic latents: noise of unit variance with more power at low frequencies."""
    generator = torch.Generator().manual_seed(0)
    side = max(2, 256 // config.cell_side)

    def latent() -> Tensor:
        coarse = torch.randn(1, config.latent_channels, -(-side // 4), -(-side // 4), generator=generator)
        fine = torch.randn(1, config.latent_channels, side, side, generator=generator)
        return (0.8 * F.interpolate(coarse, (side, side), mode="nearest") + 0.6 * fine)[0]

    samples = tuple(CalibrationSample(f"synthetic {i}", latent(), s, None) for i, s in enumerate(SYNTHETIC_SIGMAS))
    return Calibration(samples, f"{len(samples)} synthetic latents", synthetic=True)


def crop_for_device(calibration: Calibration, config: PidConfig, device: torch.device) -> Calibration:
    """Crop the latents centrally to what a CPU can decode in reasonable time; on a GPU return them unchanged."""
    if device.type != "cpu":
        return calibration
    side = max(1, int((_CPU_TOKENS * PATCH_PIXELS) ** 0.5) // config.cell_side)

    def crop(latent: Tensor) -> Tensor:
        top, left = (max(0, (length - side) // 2) for length in latent.shape[1:])
        return latent[:, top : top + side, left : left + side]

    return replace(calibration, samples=tuple(replace(s, latent=crop(s.latent)) for s in calibration.samples))


def output_size(latent: Tensor, config: PidConfig) -> Size:
    """Return the output size of a latent [c, h, w]."""
    return Size(latent.shape[1] * config.cell_side, latent.shape[2] * config.cell_side)


@torch.inference_mode()
def decode(network: FoldedDecoder, item: CalibrationSample, empty_caption: Tensor, seed: int) -> Tensor:
    """Decode a sample to an image [3, H, W] float32 on the CPU, in [-1, 1]; a seed always gives the same noise.

    Raises:
        VerificationError: The image contains infinity or NaN.
    """
    device = network.y_pos_embedding.device
    caption = empty_caption if item.caption is None else item.caption
    size = output_size(item.latent, network.config)
    noise = NoiseSource(seed, "cpu")
    start, *steps = [noise.draw(size)[None].to(device) for _ in range(MAX_STEPS)]
    conditioning = network.condition(item.latent[None].to(device), caption[None].float().to(device), size)
    image = sample(network, conditioning, start, item.sigma, steps)[0]
    if not image.isfinite().all():
        raise VerificationError(
            f"The network decodes {item.source} to infinity or NaN; leave it out of the calibration, or check the "
            "weights."
        )
    return image.clamp(-1, 1).cpu()


def calibrate(
    network: FoldedDecoder,
    calibration: Calibration,
    empty_caption: Tensor,
    layers: Sequence[str],
    attention_names: Sequence[str],
    progress: Callable[[str], None],
) -> tuple[Ranges, list[Tensor]]:
    """Decode all samples, the first with seed 0, the second with seed 1 and so on.

    Returns:
        The ranges of the named linear layers and attentions, and the decoded images [3, H, W].
    """
    images = []
    with _record_inputs(network, layers) as inputs, _record_attentions(network, attention_names) as read:
        for seed, item in enumerate(calibration.samples):
            progress(f"latent {seed + 1} of {len(calibration.samples)}")
            images.append(decode(network, item, empty_caption, seed))
    ranges = Ranges(
        {layer: largest.item() for layer, largest in inputs.items()},
        {name: AttentionRange(*largest.tolist()) for name, largest in read.items()},
    )
    return ranges, images


@contextmanager
def _record_inputs(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    largest: dict[str, Tensor] = {}

    def watch(layer: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _update(largest, layer, inputs[0].detach().abs().max())

        return network.get_submodule(layer).register_forward_pre_hook(hook)

    handles = [watch(layer) for layer in layers]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_attentions(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the largest |q|, |k| and |v| [3] that reach the kernels of the attentions."""
    largest: dict[str, Tensor] = {}
    modules = attentions(network)

    def recording(name: str, kernel: AttentionKernel) -> AttentionKernel:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            _update(largest, name, torch.stack([tensor.detach().abs().max().float() for tensor in (q, k, v)]))
            return kernel(q, k, v)

        return attend

    kernels = {name: modules[name].kernel for name in names}
    for name, kernel in kernels.items():
        modules[name].kernel = recording(name, kernel or F.scaled_dot_product_attention)
    try:
        yield largest
    finally:
        for name, kernel in kernels.items():
            modules[name].kernel = kernel


def _update(largest: dict[str, Tensor], name: str, current: Tensor) -> None:
    largest[name] = torch.maximum(largest[name], current) if name in largest else current


def _load_sample(path: Path, config: PidConfig, caption_tokens: int) -> CalibrationSample:
    tensors = load_tensors(path)
    latent = tensors.get(LATENT_KEY)
    if latent is not None and latent.ndim == 4 and latent.shape[0] == 1:
        latent = latent[0]
    if latent is None or latent.ndim != 3 or latent.shape[0] != config.latent_channels:
        found = "none" if latent is None else list(latent.shape)
        raise ConfigError(f"{path} must contain a tensor 'latent' [{config.latent_channels}, h, w], found {found}.")
    try:
        config.latent_size(output_size(latent, config))
    except ConfigError as error:
        raise ConfigError(f"The latent in {path} is too large or empty. {error}") from error
    caption = tensors.get(CAPTION_KEY)
    expected = (caption_tokens, config.caption_width)
    if caption is not None and caption.shape != expected:
        raise ConfigError(f"'caption' in {path} has shape {list(caption.shape)}; this build needs {list(expected)}.")
    sigma = tensors.get(SIGMA_KEY, torch.zeros(()))
    if sigma.numel() != 1 or not 0 <= sigma.item() <= 1:
        raise ConfigError(f"'sigma' in {path} must be a single number from 0 to 1.")
    if not is_finite(latent) or not (caption is None or is_finite(caption)):
        raise ConfigError(f"{path} must contain only finite floating-point numbers.")
    return CalibrationSample(path.name, latent.float(), sigma.item(), None if caption is None else caption.float())
