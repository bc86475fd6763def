"""What the PNG encoder costs: `python -m loadtest.png_encoder [--image FILE] [--json FILE]`.

Prints minimum and median over interleaved rounds, sizes, the time to the first bytes, and how long another Python
thread had to wait while encoding, beside how long it waits on an idle process.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundled.decoder import PHOTO
from server.images import pillow, png

Pixels = NDArray[np.uint8]

SENSOR_NOISE = 1.0  # standard deviation, in steps of eight bits
_TICK_S = 5e-4


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.png_encoder", description="Measure the PNG encoder.")
    parser.add_argument("--image", type=Path, help="photo to crop or enlarge to the size (default: the bundled one)")
    parser.add_argument("--size", type=int, default=2048, help="pixels a side (default: 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    options = parser.parse_args(arguments)
    if options.size < 1 or options.rounds < 1:
        parser.error("--size and --rounds are at least 1")
    path = options.image or (PHOTO)
    if path:
        pixels, source = read_photo(path, options.size)
    else:
        pixels, source = synthetic_photo(options.size), "synthetic: octaves of noise, edges and sensor noise"
    report = measure(pixels, options.rounds) | {"source": source, "size": options.size}
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def read_photo(path: Path, size: int) -> tuple[Pixels, str]:
    """The middle of a photo, [size, size, 3] at its own resolution, and its description.

    A smaller photo is enlarged, which makes it soft, and gets a sensor's noise instead of the texture it lacks.
    """
    with Image.open(path) as image:
        photo = image.convert("RGB")
    scale = size / min(photo.size)
    if scale > 1:
        photo = photo.resize((max(round(photo.width * scale), size), max(round(photo.height * scale), size)))
    left, top = (photo.width - size) // 2, (photo.height - size) // 2
    pixels = np.array(photo.crop((left, top, left + size, top + size)))
    if scale <= 1:
        return pixels, path.name
    noise = np.random.default_rng(0).normal(0, SENSOR_NOISE, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8), f"{path.name}, enlarged, with sensor noise"


def synthetic_photo(size: int, seed: int = 0) -> Pixels:
    """[size, size, 3] with a photo's mixture: noise of many scales, hard edges, a sensor's noise on each channel."""
    rng = np.random.default_rng(seed)
    light = np.zeros((size, size))
    for octave in range(2, 10):
        cells = rng.normal(size=(2**octave + 1, 2**octave + 1)).astype(np.float32)
        light += np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)) * 0.8**octave
    y, x = np.mgrid[:size, :size] / size
    for _ in range(12):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5)
        light += rng.normal(0, 0.3) * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) > offset)
    colour = 128 + 45 * light[..., None] * (1.0, 0.9, 0.75) + rng.normal(0, SENSOR_NOISE, (size, size, 3))
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def measure(pixels: Pixels, rounds: int) -> dict[str, Any]:
    """Every case once a round, so that the machine's moods meet all alike; sizes are fractions of the raw pixels."""
    png.warm_up()
    height, width, _ = pixels.shape
    first_rows = png.strip_bounds(width, height)[0][1]
    with ThreadPoolExecutor(2) as pool:
        cases: dict[str, Callable[[], bytes]] = {
            "fast": lambda: png.encode(pixels),
            "fast, 2 threads": lambda: encode_with(pool, pixels),
            "first bytes": lambda: png.png_head(width, height) + png.encode_strip(pixels[:first_rows], None).data,
            "none": lambda: png.encode(pixels, compression="none"),
            "best": lambda: png.encode(pixels, compression="best"),
            "Pillow, default": lambda: pillow_png(pixels),
            "JPEG 90": lambda: pillow.encode_jpeg(pixels, 90),
            "WebP 80": lambda: pillow.encode_webp(pixels, 80),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        sizes = {}
        for _ in range(rounds):
            for name, encode in cases.items():
                start = time.perf_counter()
                sizes[name] = len(encode())
                seconds[name].append(time.perf_counter() - start)
    return {
        "cases": {
            name: {
                "min_ms": 1e3 * min(seconds[name]),
                "median_ms": 1e3 * statistics.median(seconds[name]),
                "size": sizes[name] / pixels.size,
            }
            for name in cases
        },
        "times_faster_than_pillow": min(seconds["Pillow, default"]) / min(seconds["fast"]),
        "longest_wait_ms": {
            "idle": longest_wait(lambda: time.sleep(1.0)),
            "encoding": longest_wait(lambda: [png.encode(pixels) for _ in range(20)]),
        },
    }


def encode_with(pool: ThreadPoolExecutor, pixels: Pixels) -> bytes:
    """As `png.encode`, the strips shared out among threads."""
    height, width, _ = pixels.shape

    def strip(bounds: tuple[int, int]) -> png.Strip:
        start, stop = bounds
        return png.encode_strip(pixels[start:stop], pixels[start - 1] if start else None)

    strips = list(pool.map(strip, png.strip_bounds(width, height)))
    tail = png.png_tail(strip.checksum for strip in strips)
    return b"".join((png.png_head(width, height), *(strip.data for strip in strips), tail))


def pillow_png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def longest_wait(work: Callable[[], object]) -> float:
    """The most milliseconds beyond its sleep that a ticking thread missed while `work` ran on another."""
    worker = threading.Thread(target=work)
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        time.sleep(_TICK_S)
        now = time.perf_counter()
        longest, last = max(longest, now - last - _TICK_S), now
    return 1e3 * longest


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['size']} x {report['size']}, {report['source']}",
        f"{'':18}{'min ms':>9}{'median':>9}{'size':>8}",
    ]
    for name, case in report["cases"].items():
        lines.append(f"{name:18}{case['min_ms']:9.2f}{case['median_ms']:9.2f}{case['size']:8.4f}")
    waits = report["longest_wait_ms"]
    lines.append(f"{report['times_faster_than_pillow']:.1f} times faster than Pillow's default")
    lines.append(f"another thread waited {waits['encoding']:.1f} ms at most ({waits['idle']:.1f} when idle)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
