"""Evaluate the bundled decoder on held-out photos.

    python -m engines.training.evaluate --data DIR [--teacher FILE] [--checkpoint FILE] [--sheet PNG]

Prints the tables of docs/bundled-decoder.md as Markdown, and optionally writes a contact sheet.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads spin otherwise and starve a busy CPU

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.bundled import dct
from engines.bundled.decoder import CHECKPOINT, CONFIG
from engines.cli import ArgumentParser
from engines.errors import ConfigError
from engines.pid import PidDecoder, sample
from engines.runtime.devices import default_device
from engines.size import Size
from engines.training import figures, flow, metrics, photos, teacher

# The teacher is evaluated at the first size only, because its 25 steps take long.
SIZES = (Size(256, 256), Size(512, 512), Size(384, 256))
SIGMAS = (0.0, 0.2, 0.4)
SHEET_SIZE, SHEET_PHOTOS = Size(144, 144), ("Garden", "astronaut", "chelsea", "picosdeeuropa_by_Aitzol_Berasategi")


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


def table_rows(image: Tensor, student: PidDecoder, teacher_decoder: PidDecoder | None) -> list[str]:
    """Return the Markdown rows of all measurements on images [B, 3, H, W]."""
    result = [f"| 0 | original | | 1 | 1 | {metrics.grid(image):.2f} |"]
    for sigma in SIGMAS:
        latent = add_fixed_noise(dct.encode(dct.downscale(image)), sigma)
        for name, decoded in _decode_all(latent, sigma, student, teacher_decoder).items():
            values = (
                f"{metrics.psnr(decoded, image):.2f} | {metrics.ssim(decoded, image):.3f} | "
                f"{metrics.sharpness(decoded, image):.2f} | {metrics.grid(decoded):.2f}"
            )
            result.append(f"| {sigma:g} | {name} | {values} |")
    return result


def _decode_all(
    latent: Tensor, sigma: float, student: PidDecoder, teacher_decoder: PidDecoder | None
) -> dict[str, Tensor]:
    """Decode latents of one noise level with all decoders that are compared; return images by name."""
    decoded = {"bicubic": metrics.bicubic(latent)}
    if teacher_decoder is not None:
        sampled = teacher.sample(teacher_decoder, latent, _noises(latent, 1, 0)[0], sigma)
        decoded[f"teacher, {teacher.SAMPLE_STEPS} steps"] = sampled.clamp(-1, 1)
    for steps in (4, 2, 1):
        decoded[f"student, {steps} step{'s' * (steps > 1)}"] = decode(student, latent, sigma, steps)
    if sigma == max(SIGMAS):
        decoded["student, 4 steps, given sigma 0"] = decode(student, latent, 0.0)
    return decoded


def _middle(photo: np.ndarray, size: Size) -> np.ndarray:
    top, left = ((have - want) // 2 for have, want in zip(photo.shape, size, strict=False))
    return photo[top : top + size.height, left : left + size.width]


def contact_sheet(data: Path, decoder: PidDecoder, path: Path) -> None:
    """Save a sheet with one photo per row: original, bicubic, decoded, and decoded minus original around grey."""
    smallest = [np.load(max((data / "photos").glob(f"{title}.*.npy"))) for title in SHEET_PHOTOS]
    image = photos.to_tensor(np.stack([_middle(photo, SHEET_SIZE) for photo in smallest]))
    latent = dct.encode(dct.downscale(image))
    decoded = decode(decoder, latent)
    columns = (image, metrics.bicubic(latent), decoded, (decoded - image).clamp(-1, 1))
    figures.save_sheet(list(torch.stack(columns, dim=1)), path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
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
    add("--sheet", type=Path, metavar="FILE", help="write a contact sheet to this PNG file")
    options = parser.parse_args(arguments)
    try:
        device = default_device()
    except ConfigError as error:
        parser.error(str(error))
    student = load_decoder(options.checkpoint).to(device)
    teacher_decoder = load_decoder(options.teacher).to(device) if options.teacher is not None else None
    for size in SIZES:
        image = held_out(options.data, size).to(device)
        print(f"\n{len(image)} crops of {size.height}×{size.width} (height × width)\n")
        print("| sigma | decoded by | PSNR, dB | SSIM | sharpness | grid |\n| --- | --- | --- | --- | --- | --- |")
        print("\n".join(table_rows(image, student, teacher_decoder if size == SIZES[0] else None)), flush=True)
    if options.sheet is not None:
        contact_sheet(options.data, student.cpu(), options.sheet)


if __name__ == "__main__":
    main()
