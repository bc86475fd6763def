"""Evaluate the bundled decoder on held-out photos.

    python -m engines.training.evaluate --data DIR [--teacher FILE] [--checkpoint FILE] [--esrgan DIR] [--sheet PNG]

Prints the tables of docs/bundled-decoder.md as Markdown, and optionally writes a contact sheet.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads spin otherwise and starve a busy CPU

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import CHECKPOINT, CONFIG
from engines.cli import ArgumentParser
from engines.errors import CheckpointError, ConfigError
from engines.pid import PidDecoder, sample
from engines.runtime.devices import default_device
from engines.size import Size
from engines.training import figures, flow, metrics, photos, tables, teacher
from engines.training.esrgan import PACKAGE, Esrgan
from engines.training.esrgan import load as load_esrgan
from engines.training.photo_sources import HELD_OUT

# The teacher is evaluated at the first size only, because its 25 steps take long.
SIZES = (Size(256, 256), Size(512, 512), Size(384, 256))
SIGMAS = (0.0, 0.2, tables.TARGET_SIGMA)
SHEET_SIZE = Size(176, 176)


def load_decoder(path: Path = CHECKPOINT) -> PidDecoder:
    """Load a decoder with float32 weights, in evaluation mode."""
    decoder = PidDecoder(CONFIG)
    decoder.load_state_dict(load_file(path))
    return decoder.eval()


def _noises(latent: Tensor, count: int, seed: int) -> Tensor:
    """Return unit normal noise [count, B, 3, H, W] on the latent's device; it depends on the seed only."""
    size = (CONFIG.cell_side * latent.shape[2], CONFIG.cell_side * latent.shape[3])
    return torch.randn((count, len(latent), 3, *size), generator=torch.Generator().manual_seed(seed)).to(latent)


@torch.no_grad()
def decode(decoder: PidDecoder, latent: Tensor, sigma: float = 0.0, steps: int = 4, seed: int = 0) -> Tensor:
    """Decode with the server's sampler: float32 latent [B, 16, h, w] -> image [B, 3, 16h, 16w] in [-1, 1]."""
    noise = _noises(latent, steps, seed)
    return sample(decoder, flow.condition(decoder, latent), noise[0], sigma, list(noise[1:]), steps).clamp(-1, 1)


def held_out(data: Path, size: Size) -> Tensor:
    """Return one fixed crop from each stored size of each held-out photo that is large enough: [B, 3, H, W]."""
    random = np.random.default_rng(1)
    fitting = [photo for photo in photos.load(data, held_out=True) if min(photo.shape[:2]) >= max(size)]
    return photos.to_tensor(np.stack([photos.random_crop([photo], size, random) for photo in fitting]))


def add_fixed_noise(latent: Tensor, sigma: float) -> Tensor:
    """Add noise to latents, as if the diffusion had been stopped at noise level sigma; always the same noise."""
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    return flow.diffuse(latent, sigma, noise.to(latent))


@dataclass(frozen=True)
class Decoders:
    """The student, and what it is compared with, all on one device."""

    student: PidDecoder
    teacher: PidDecoder | None = None
    esrgan: Esrgan | None = None


def measure(image: Tensor, decoders: Decoders) -> tables.Results:
    """Return all measurements on images [B, 3, H, W]. ESRGAN is measured at sigma 0 only: it knows nothing of noise."""
    results = {tables.Key(0, tables.ORIGINAL): metrics.measure(image, image)}
    for sigma in SIGMAS:
        latent = add_fixed_noise(dct.encode(dct.downscale(image)), sigma)
        for name, decoded in _decode_all(latent, sigma, decoders).items():
            results[tables.Key(sigma, name)] = metrics.measure(decoded, image)
    return results


def _decode_all(latent: Tensor, sigma: float, decoders: Decoders) -> dict[str, Tensor]:
    """Decode latents of one noise level with all decoders that are compared; return images by name."""
    decoded = {tables.BICUBIC: metrics.bicubic(latent)}
    if decoders.esrgan is not None and sigma == 0:
        decoded[tables.ESRGAN] = decoders.esrgan.upscale(metrics.low_resolution(latent))
    if decoders.teacher is not None:
        sampled = teacher.sample(decoders.teacher, latent, _noises(latent, 1, 0)[0], sigma)
        decoded[f"teacher, {teacher.SAMPLE_STEPS} steps"] = sampled.clamp(-1, 1)
    for steps in (4, 2, 1):
        decoded[tables.student(steps)] = decode(decoders.student, latent, sigma, steps)
    if sigma == tables.TARGET_SIGMA:
        decoded[tables.student(4, given_zero=True)] = decode(decoders.student, latent, 0.0)
    return decoded


def _middle(photo: np.ndarray, size: Size) -> np.ndarray:
    top, left = ((have - want) // 2 for have, want in zip(photo.shape, size, strict=False))
    return photo[top : top + size.height, left : left + size.width]


def contact_sheet(data: Path, decoders: Decoders, path: Path) -> None:
    """Save a sheet with the middle of one held-out photo per row.

    The columns are the original, bicubic, decoded, and decoded from a latent with noise of TARGET_SIGMA. With ESRGAN,
    its image is between bicubic and decoded.
    """
    smallest = [np.load(max((data / "photos").glob(f"{title}.*.npy"))) for title in HELD_OUT]
    image = photos.to_tensor(np.stack([_middle(photo, SHEET_SIZE) for photo in smallest]))
    image = image.to(next(decoders.student.parameters()).device)
    latent = dct.encode(dct.downscale(image))
    columns = [image, metrics.bicubic(latent)]
    if decoders.esrgan is not None:
        columns.append(decoders.esrgan.upscale(metrics.low_resolution(latent)))
    sigmas = (0.0, tables.TARGET_SIGMA)
    columns += [decode(decoders.student, add_fixed_noise(latent, sigma), sigma) for sigma in sigmas]
    figures.save_sheet(list(torch.stack(columns, dim=1)), path)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engines.training.evaluate",
        usage="%(prog)s --data DIR [options]",
        description="Evaluate the bundled decoder on held-out photos, and print the tables of docs/bundled-decoder.md.",
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="output of engines.training.photos (required)",
    )
    add(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        metavar="FILE",
        help="weights of the student (default: the bundled decoder)",
    )
    add("--teacher", type=Path, metavar="FILE", help="weights of the teacher, to evaluate it as well")
    add(
        "--esrgan",
        type=Path,
        metavar="DIR",
        help=f"folder of the unpacked npm package {PACKAGE}, to compare with this published ESRGAN",
    )
    add("--sheet", type=Path, metavar="FILE", help="write a contact sheet to this PNG file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        device = default_device()
        esrgan = load_esrgan(options.esrgan).to(device) if options.esrgan is not None else None
    except (CheckpointError, ConfigError) as error:
        parser.error(str(error))
    student = load_decoder(options.checkpoint).to(device)
    teacher_decoder = load_decoder(options.teacher).to(device) if options.teacher is not None else None
    results = {}
    for size in SIZES:
        image = held_out(options.data, size).to(device)
        decoders = Decoders(student, teacher_decoder if size == SIZES[0] else None, esrgan)
        results[size] = measure(image, decoders)
        print(f"\n{len(image)} crops of {size.height}×{size.width} (height × width)\n")
        print(tables.measurements(results[size]), flush=True)
    print(f"\nTargets, and results in four steps\n\n{tables.targets(results)}")
    if options.sheet is not None:
        contact_sheet(options.data, Decoders(student, esrgan=esrgan), options.sheet)


if __name__ == "__main__":
    main()
