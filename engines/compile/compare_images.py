"""Decodes the calibration latents with a network in several precisions, and compares the images with the original's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engines.bundle import writing
from engines.compile import verify_fold
from engines.compile.choose_attention import describe_attention
from engines.compile.choose_layers import Assignment, describe_layers
from engines.compile.comparison import psnr
from engines.compile.inputs.calibrate import Calibration, Ranges, decode, output_size
from engines.compile.planning.attention import AttentionKinds
from engines.compile.planning.layer_rules import attention_kind
from engines.compile.planning.options import Progress
from engines.compile.results import ImageResult, mean_psnr
from engines.compile.variants import QuantisedLayers, TrialNetwork
from engines.compile.verify_fold import Probe
from engines.pid import FoldedDecoder
from engines.pid.fp8_attention import AttentionRange
from engines.pixels import to_uint8

SAVED_IMAGES = 4  # calibration images that the report shows


@dataclass(frozen=True)
class Measurement:
    """A network with some precisions, compared with the original one."""

    velocity_error: tuple[float, ...]  # relative, per timestep
    pictures: tuple[ImageResult, ...]

    @property
    def psnr(self) -> float:
        """Mean PSNR of the images in dB."""
        return mean_psnr(self.pictures)


@dataclass(frozen=True)
class Originals:
    """What the original network computes."""

    calibration: Calibration
    images: Sequence[Tensor]  # decoded from the calibration latents, [3, H, W]
    empty_caption: Tensor  # [T, E]
    probe: Probe
    velocities: Tensor  # for the probe


class Trials:
    """Measures precisions of layers and attentions, each combination once.

    Attributes:
        measured: The measurements in the order they were made, by mixture and kinds of attention.
    """

    def __init__(
        self,
        network: FoldedDecoder,
        layers: QuantisedLayers,
        ranges: Ranges,
        originals: Originals,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Make a copy of the network on a device; `layers` are its quantised layers."""
        self._trial = TrialNetwork(network, layers, device)
        self._ranges, self._originals, self._progress = ranges, originals, progress
        self._probe = originals.probe.to(device)
        self.measured: list[tuple[Assignment, AttentionKinds, Measurement]] = []

    def measure(self, mixture: Assignment, kinds: AttentionKinds) -> Measurement:
        """Decode the calibration latents, with the noise of the original images."""
        for other_mixture, other_kinds, measurement in self.measured:
            if (other_mixture, other_kinds) == (mixture, kinds):
                return measurement
        self._trial.set(mixture, attentions_of(kinds, self._ranges))
        precisions = list(mixture.values())
        layers = describe_layers(precisions.count("fp4"), precisions.count("fp8"))
        measurement = self._measure(f"{layers}, {describe_attention(kinds)}")
        self.measured.append((mixture, kinds, measurement))
        return measurement

    def decode(self, mixture: Assignment, kinds: AttentionKinds, count: int) -> Iterator[Tensor]:
        """Decode the first calibration latents, with the noise of the original images."""
        self._trial.set(mixture, attentions_of(kinds, self._ranges))
        for seed, item in enumerate(self._originals.calibration.samples[:count]):
            yield decode(self._trial.decoder, item, self._originals.empty_caption, seed)

    def _measure(self, description: str) -> Measurement:
        originals, network = self._originals, self._trial.decoder
        pictures = []
        pairs = zip(originals.calibration.samples, originals.images, strict=True)
        for seed, (item, original) in enumerate(pairs):
            self._progress("compare", f"image {seed + 1} of {len(originals.images)}; {description}")
            image = decode(network, item, originals.empty_caption, seed)
            size = output_size(item.latent, network.config)
            pictures.append(ImageResult(source=item.source, sigma=item.sigma, size=size, psnr=psnr(original, image)))
        velocities = verify_fold.velocities(network, self._probe).cpu()
        error = verify_fold.relative_errors(velocities, originals.velocities)
        return Measurement(error, tuple(pictures))


def attentions_of(kinds: AttentionKinds, ranges: Ranges) -> dict[str, AttentionRange]:
    """Return the ranges of the attentions of some kinds."""
    return {name: found for name, found in ranges.attentions.items() if attention_kind(name) in kinds}


def image_files(index: int) -> tuple[str, str, str]:
    """Return the file names of a calibration image: not quantised, quantised, their difference."""
    return f"picture-{index}.png", f"picture-{index}-quantised.png", f"picture-{index}-difference.png"


def save_images(folder: Path, originals: Sequence[Tensor], images: Iterable[Tensor]) -> None:
    """Save pairs of images, original and quantised, and their tenfold difference on grey."""
    for index, (original, image) in enumerate(zip(originals, images, strict=False)):
        difference = (10 * (image - original)).clamp(-1, 1)
        for name, pixels in zip(image_files(index), (original, image, difference), strict=True):
            with writing(folder / name):
                Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy()).save(folder / name)
