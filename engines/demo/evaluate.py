"""Measures the bundled decoder on the held-out photos: `python -m engines.demo.evaluate --data DIR [--sheet PNG]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from engines.demo import dct, photos
from engines.demo.decoder import CAPTION_TOKENS, CHECKPOINT, CONFIG
from engines.pid import PidDecoder, sample


def load(path: Path = CHECKPOINT) -> PidDecoder:
    """The decoder in a checkpoint, with float32 weights."""
    decoder = PidDecoder(CONFIG)
    decoder.load_state_dict(load_file(path))
    return decoder.eval()


@torch.no_grad()
def decode(decoder: PidDecoder, latent: Tensor, sigma: float = 0.0, steps: int = 4, seed: int = 0) -> Tensor:
    """The whole sampler: float32 latent [B, 16, h, w] -> image [B, 3, 16h, 16w] in [-1, 1]."""
    batch, _, rows, columns = latent.shape
    size = (dct.BLOCK * dct.UPSCALE * rows, dct.BLOCK * dct.UPSCALE * columns)
    noise = torch.randn((steps, batch, 3, *size), generator=torch.Generator().manual_seed(seed))
    conditioning = decoder.condition(latent, torch.zeros(batch, CAPTION_TOKENS, CONFIG.caption_width), size)
    return sample(decoder, conditioning, noise[0], sigma, list(noise[1:]), steps).clamp(-1, 1)


def bicubic(latent: Tensor) -> Tensor:
    """What upscaling makes of the latent without a network: [B, 16, h, w] -> [B, 3, 16h, 16w]."""
    return F.interpolate(dct.decode(latent), scale_factor=dct.UPSCALE, mode="bicubic").clamp(-1, 1)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Mean over the batch in dB, for pictures in [-1, 1]."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error)).mean().item()


def sharpness(image: Tensor) -> float:
    """Mean absolute difference between neighbouring pixels."""
    return 0.5 * (image.diff(dim=2).abs().mean() + image.diff(dim=3).abs().mean()).item()


def grid(image: Tensor) -> float:
    """How much the difference between neighbours grows where patches meet; 1 where the patch grid cannot be seen."""
    columns = image.diff(dim=3).abs().mean(dim=(0, 1, 2))
    rows = image.diff(dim=2).abs().mean(dim=(0, 1, 3))
    across = torch.cat((columns[15::16], rows[15::16])).mean()
    return (across / torch.cat((columns, rows)).mean()).item()


def save(images: list[Tensor], path: Path) -> None:
    """Rows of pictures, each [B, 3, H, W], one below the other as a PNG."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in images], dim=1)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().movedim(0, -1).numpy()).save(path)


def held_out(data: Path, count: int, size: tuple[int, int]) -> Tensor:
    """The same random crops of held-out photos every time, [count, 3, H, W]."""
    return photos.random_crops(photos.load(data, held_out=True), count, size, np.random.default_rng(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that engines.demo.photos filled")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--sheet", type=Path, help="where to write originals, bicubic and decoded pictures as a PNG")
    options = parser.parse_args()
    decoder = load(options.checkpoint)
    for count, size in ((12, (256, 256)), (4, (512, 512)), (4, (384, 256))):
        image = held_out(options.data, count, size)
        latent = dct.encode(dct.downscale(image))
        decoded, upscaled = decode(decoder, latent), bicubic(latent)
        print(f"{size[0]}x{size[1]}, PSNR in dB: bicubic {psnr(upscaled, image):.2f}", end="")
        for steps in (4, 3, 2, 1):
            print(f", {steps} steps {psnr(decode(decoder, latent, steps=steps), image):.2f}", end="")
        for name, measure in (("sharpness", sharpness), ("grid", grid)):
            print(f"\n  {name}: original {measure(image):.4f}", end="")
            print(f", bicubic {measure(upscaled):.4f}, decoded {measure(decoded):.4f}", end="")
        noisy = 0.6 * latent + 0.4 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
        print(f"\n  at sigma 0.4: bicubic {psnr(bicubic(noisy), image):.2f}", end="")
        for told in (0.4, 0.0, 0.8):
            print(f", told {told} {psnr(decode(decoder, noisy, told), image):.2f}", end="")
        print(flush=True)
        if options.sheet is not None:
            name = options.sheet.with_stem(f"{options.sheet.stem}-{size[0]}x{size[1]}")
            save([image[:6], upscaled[:6], decoded[:6], decode(decoder, noisy, 0.4)[:6]], name)


if __name__ == "__main__":
    main()
