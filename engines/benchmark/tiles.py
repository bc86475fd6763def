"""Measures images in tiles with the bundled decoder: how close they are to images decoded as a whole, time and memory.

python -m engines.benchmark.tiles --picture docs/images/tiles.png > docs/measurements/tiles.md

Needs the photos of scikit-image, which is part of the extra `train`. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads spin otherwise and starve a busy CPU

import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from engines.benchmark.decoders import make_runtime
from engines.benchmark.tiles_text import BLENDS, IMAGES, INTRODUCTION, MEMORY, OVERLAPS, PICTURE, TABLES
from engines.benchmark.tiles_variants import BLEND_NAMES, TABLE_NAMES, Comparison, compare, decode_variant, decode_whole
from engines.bundled import dct
from engines.bundled.decoder import CAPTION_TOKENS, CHECKPOINT, CONFIG, DESCRIPTION, PHOTO, read_photo
from engines.cli import ArgumentParser
from engines.compile.comparison import psnr
from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS, step_indices
from engines.pixels import from_uint8, to_uint8
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import Sample
from engines.runtime.tiles import TilePlan
from engines.size import Size

TILE = Size(512, 512)
SQUARE = Size(1024, 1024)
SIZES = (SQUARE, Size(768, 1536), Size(1024, 2048))
OVERLAP_PIXELS = (16, 32, 64, 96, 128, 192, 256)
SKIMAGE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")
RUNS = 3  # of each time
CROP = 384  # side of the parts in the picture
AMPLIFIED = 16  # difference in the picture


def load_decoder() -> FoldedDecoder:
    """Return the bundled decoder in float32."""
    decoder = PidDecoder(CONFIG)
    decoder.load_state_dict(load_file(CHECKPOINT))
    return fold(decoder.eval(), MODEL_TIMESTEPS)


def photos() -> list[Path]:
    """Return the photos that are decoded: the bundled one, then some of scikit-image."""
    import skimage

    return [PHOTO, *(Path(skimage.__file__).parent / "data" / name for name in SKIMAGE_PHOTOS)]


def encode(photo: Path, size: Size) -> Tensor:
    """Return the latent [c, h, w] that decodes to a photo, scaled and cropped to fill `size`."""
    pixels = to_uint8(read_photo(photo)).permute(1, 2, 0).numpy()
    low = ImageOps.fit(Image.fromarray(pixels), (size.width // dct.UPSCALE, size.height // dct.UPSCALE))
    return dct.encode(from_uint8(torch.from_numpy(np.array(low)))[None])[0]


def open_runtime(decoder: FoldedDecoder, size: Size, max_pixels: int | None = None) -> DeviceRuntime:
    """Return a runtime of one size that is ready to decode, with captions as in the training of the decoder."""
    runtime = make_runtime(decoder, DESCRIPTION, [size], 1, "fp32", max_pixels=max_pixels)
    caption = torch.zeros(CAPTION_TOKENS, CONFIG.caption_width)
    runtime = DeviceRuntime(runtime.backend, caption, replace(runtime.info, caption_tokens=CAPTION_TOKENS))
    runtime.warm_up()
    return runtime


def decode(runtime: DeviceRuntime, latent: Tensor, size: Size) -> Tensor:
    """Decode a latent with the seed 0 and return the image, [3, H, W] in [-1, 1], rounded to 8 bits."""
    slot = runtime.start(Sample(latent, size))
    for index in step_indices(MAX_STEPS):
        for _ in range(len(runtime.info.tiles(size) or (size,))):
            runtime.step([slot], [index])
    rows = runtime.finish(slot)
    image = from_uint8(torch.from_numpy(rows.pixels))
    rows.close()
    runtime.release(slot)
    return image


def image_rows(decoder: FoldedDecoder) -> Iterator[str]:
    """Yield the table of images of several sizes, decoded by the runtime in tiles and as a whole, in turn."""
    yield "| image | tiles | PSNR, mean | PSNR, lowest | largest block | borders | elsewhere | whole | tiles | ratio |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for size in SIZES:
        whole, tiled = open_runtime(decoder, size), open_runtime(decoder, TILE, size.area)
        plan = tiled.info.tiles(size)
        assert plan is not None  # noqa: S101  for mypy
        results, seconds = [], []
        for photo in photos():
            latent = encode(photo, size)
            images = []
            for runtime in (whole, tiled):
                began = time.perf_counter()
                images.append(decode(runtime, latent, size))
                seconds.append(time.perf_counter() - began)
            results.append(compare(images[1], images[0], plan))
        times = [statistics.median(seconds[i::2]) for i in range(2)]
        duration = f"{times[0]:.2f} s | {times[1]:.2f} s | {times[1] / times[0]:.2f}"
        yield f"| {_title(size)} | {len(plan)} | {_quality(results)} | {duration} |"


def overlap_rows(decoder: FoldedDecoder) -> Iterator[str]:
    """Yield the table of overlaps: two tiles side by side."""
    yield "| overlap | latent cells | PSNR, mean | lowest | of the overlap, mean | lowest | largest block | borders |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for overlap in OVERLAP_PIXELS:
        plan = _two_tiles(overlap)
        results, parts = [], []
        for latent, whole in _whole_images(decoder, plan.image):
            tiled = decode_variant(decoder, latent, plan)
            results.append(compare(tiled, whole, plan))
            area = slice(plan.columns[1], TILE.width)
            parts.append(psnr(tiled[..., area], whole[..., area]))
        block, border, _ = _worst(results)
        cells = [_psnr([result.psnr for result in results]), _psnr(parts), f"{block:.1f}", f"{border:.2f}"]
        yield f"| {overlap} | {overlap // CONFIG.cell_side} | {' | '.join(cells)} |"


def variant_rows(decoder: FoldedDecoder, names: Sequence[str], overlaps: Sequence[int]) -> Iterator[str]:
    """Yield a table of variants of the position tables or of the blend, for two tiles."""
    yield "| overlap | variant | PSNR, mean | PSNR, lowest | largest block | borders | elsewhere |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for overlap in overlaps:
        plan = _two_tiles(overlap)
        pairs = _whole_images(decoder, plan.image)
        for name in names:
            results = [compare(decode_variant(decoder, latent, plan, name), whole, plan) for latent, whole in pairs]
            yield f"| {overlap} | {name} | {_quality(results)} |"


def _two_tiles(overlap: int) -> TilePlan:
    stride = TILE.width - overlap
    return TilePlan(Size(TILE.height, TILE.width + stride), TILE, (0,), (0, stride))


def _whole_images(decoder: FoldedDecoder, size: Size) -> list[tuple[Tensor, Tensor]]:
    latents = [encode(photo, size) for photo in photos()]
    return [(latent, decode_whole(decoder, latent, size)) for latent in latents]


def _quality(results: Sequence[Comparison]) -> str:
    block, border, elsewhere = _worst(results)
    return f"{_psnr([r.psnr for r in results])} | {block:.1f} | {border:.2f} | {elsewhere:.2f}"


def _psnr(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} | {min(values):.1f}"


def _worst(results: Sequence[Comparison]) -> tuple[float, float, float]:
    return max(r.block for r in results), max(r.border for r in results), max(r.elsewhere for r in results)


def memory_rows() -> Iterator[str]:
    """Yield the table of peaks of resident memory, each measured in a new process."""
    yield "| decode | peak | above the loaded decoder |"
    yield "| --- | --- | --- |"
    cases = {
        "512×512": (TILE, None),
        "1024×1024 in tiles of 512×512": (SQUARE, SQUARE.area),
        "1024×1024 as a whole": (SQUARE, None),
    }
    for name, (size, max_pixels) in cases.items():
        peaks = [_in_new_process(size, max_pixels) for _ in range(RUNS)]
        peak, increase = (statistics.median(values) / 1e6 for values in zip(*peaks, strict=True))
        yield f"| {name} | {peak:.0f} MB | {increase:.0f} MB |"


def _in_new_process(size: Size, max_pixels: int | None) -> tuple[int, int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(decode_memory, size, max_pixels).result()


def decode_memory(size: Size, max_pixels: int | None) -> tuple[int, int]:
    """Decode twice; return the peak of the resident memory of this process, and its increase since the loading."""
    decoder = load_decoder()
    latent = encode(PHOTO, size)
    before = _status("VmRSS")
    runtime = open_runtime(decoder, size if max_pixels is None else TILE, max_pixels)
    for _ in range(2):
        decode(runtime, latent, size)
    peak = _status("VmHWM")
    return peak, peak - before


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def save_picture(decoder: FoldedDecoder, path: Path) -> None:
    """Save the middle of the square image: decoded as a whole, in tiles, and the amplified difference."""
    latent, start = encode(PHOTO, SQUARE), (SQUARE.width - CROP) // 2
    whole = decode(open_runtime(decoder, SQUARE), latent, SQUARE)
    tiled = decode(open_runtime(decoder, TILE, SQUARE.area), latent, SQUARE)
    panels = [whole, tiled, AMPLIFIED * (tiled - whole)]
    middle = [panel[:, start : start + CROP, start : start + CROP] for panel in panels]
    Image.fromarray(to_uint8(torch.cat(middle, dim=2)).permute(1, 2, 0).numpy()).save(path, optimize=True)


def _title(size: Size) -> str:
    return f"{size.height}×{size.width}"


def page(decoder: FoldedDecoder) -> Iterator[str]:
    """Yield the lines of docs/measurements/tiles.md."""
    sections: tuple[tuple[str, Iterable[str]], ...] = (
        (INTRODUCTION, ()),
        (IMAGES, image_rows(decoder)),
        (PICTURE, ()),
        (MEMORY, memory_rows()),
        (OVERLAPS, overlap_rows(decoder)),
        (TABLES, variant_rows(decoder, TABLE_NAMES, (64, 128))),
        (BLENDS, variant_rows(decoder, BLEND_NAMES, (64, 128))),
    )
    for number, (text, rows) in enumerate(sections):
        yield from ("", *text.splitlines()) if number else text.splitlines()
        for i, row in enumerate(rows):
            yield from (row,) if i else ("", row)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="python -m engines.benchmark.tiles", description="Measure images in tiles.")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also write the picture of the page to this file")
    options = parser.parse_args(arguments)
    decoder = load_decoder()
    if options.picture is not None:
        save_picture(decoder, options.picture)
    for line in page(decoder):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
