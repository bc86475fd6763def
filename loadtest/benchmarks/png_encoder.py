"""Benchmark of the PNG encoder: `python -m loadtest.benchmarks.png_encoder [--image FILE] [--json FILE]`.

Prints minimum and median times over interleaved rounds, sizes, the time to the first bytes, and the longest time that
another Python thread was blocked during encoding, compared with an idle process.
"""

from __future__ import annotations

import io
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundled.decoder import PHOTO
from engines.cli import ArgumentParser
from loadtest.benchmarks import parallel_png
from server.images import pillow, png
from server.images.arrays import planes
from server.images.available import available_formats
from server.images.jpeg_xl import encode_jxl

Pixels = NDArray[np.uint8]

SENSOR_NOISE = 1.0  # standard deviation in 8-bit levels
_TICK_SECONDS = 5e-4
_WAITS = ("fast", "JPEG 90", "WebP 80", "AVIF 80", "AVIF 90", "JPEG XL", "raw", "planes")


@dataclass(frozen=True)
class Case:
    """Measurements of one encoder."""

    min_ms: float
    median_ms: float
    size: float  # encoded bytes / raw bytes


@dataclass(frozen=True)
class PngReport:
    """Measurements of all encoders on one image."""

    cases: dict[str, Case]
    times_faster_than_pillow: float
    longest_wait_ms: dict[str, float]  # of another thread, by encoder that runs
    source: str
    size: int  # pixels per side

    def table(self) -> str:
        """Return the measurements as text."""
        lines = [f"{self.size} x {self.size}, {self.source}", f"{'':18}{'min ms':>9}{'median':>9}{'size':>8}"]
        lines += [f"{name:18}{c.min_ms:9.2f}{c.median_ms:9.2f}{c.size:8.4f}" for name, c in self.cases.items()]
        lines.append(f"{self.times_faster_than_pillow:.1f} times as fast as Pillow's default")
        waits = ", ".join(f"{name} {wait:.1f} ms" for name, wait in self.longest_wait_ms.items())
        lines.append(f"longest wait of another thread: {waits}")
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = ArgumentParser(
        prog="python -m loadtest.benchmarks.png_encoder",
        usage="%(prog)s [options]",
        description="Compare the PNG encoder with Pillow and with the encoders of other formats.",
    )
    add = parser.add_argument
    add(
        "--image",
        type=Path,
        default=PHOTO,
        metavar="FILE",
        help="photo to crop or enlarge to --size (default: the bundled photo)",
    )
    add("--size", type=int, default=2048, metavar="PIXELS", help="side of the square image (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="COUNT", help="times that each encoder runs (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    if options.size < 1 or options.rounds < 1:
        parser.error("--size and --rounds must be at least 1.")
    pixels, source = square_photo(options.image, options.size)
    report = measure(pixels, source, options.rounds)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


def square_photo(path: Path, size: int) -> tuple[Pixels, str]:
    """Read the central square of a photo.

    A photo smaller than `size` is enlarged. Enlarging removes the finest texture, so sensor noise is added.

    Returns:
        The pixels [size, size, 3] and a description of their source.
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


def measure(pixels: Pixels, source: str, rounds: int) -> PngReport:
    """Run every encoder once per round, so that other load on the machine affects all of them equally.

    Args:
        pixels: Square image [size, size, 3].
        source: Description of the image.
        rounds: Number of rounds.
    """
    png.warm_up()
    with ThreadPoolExecutor(2) as pool:
        encoders = _encoders(pixels, pool)
        seconds: dict[str, list[float]] = {name: [] for name in encoders}
        sizes = {}
        for _ in range(rounds):
            for name, encode in encoders.items():
                start = time.perf_counter()
                sizes[name] = len(encode())
                seconds[name].append(time.perf_counter() - start)
    return PngReport(
        cases={
            name: Case(1e3 * min(times), 1e3 * statistics.median(times), sizes[name] / pixels.size)
            for name, times in seconds.items()
        },
        times_faster_than_pillow=min(seconds["Pillow, default"]) / min(seconds["fast"]),
        longest_wait_ms={
            "idle": longest_wait(lambda: time.sleep(1.0)),
            **{name: longest_wait(partial(_repeat, encoders[name], 1.0)) for name in _WAITS if name in encoders},
        },
        source=source,
        size=pixels.shape[0],
    )


def _encoders(pixels: Pixels, pool: ThreadPoolExecutor) -> dict[str, Callable[[], bytes]]:
    height, width, _ = pixels.shape
    first_rows = png.strip_bounds(width, height)[0][1]
    encoders: dict[str, Callable[[], bytes]] = {
        "fast": lambda: png.encode(pixels),
        "fast, 2 threads": lambda: parallel_png.encode(pool, pixels),
        "first bytes": lambda: png.png_head(width, height) + png.encode_strip(pixels[:first_rows], None).data,
        "none": lambda: png.encode(pixels, compression="none"),
        "best": lambda: png.encode(pixels, compression="best"),
        "Pillow, default": lambda: pillow_png(pixels),
        "JPEG 90": lambda: pillow.encode_jpeg(pixels, 90),
        "WebP 80": lambda: pillow.encode_webp(pixels, 80),
        "raw": lambda: pixels.tobytes(),
        "planes": lambda: b"".join(planes(pixels, "signed")),
    }
    if "avif" in available_formats():
        encoders |= {
            "AVIF 80": lambda: pillow.encode_avif(pixels, 80),
            "AVIF 90": lambda: pillow.encode_avif(pixels, 90),
        }
    if "jxl" in available_formats():
        encoders["JPEG XL"] = lambda: encode_jxl(pixels)
    return encoders


def _repeat(work: Callable[[], object], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        work()


def pillow_png(pixels: Pixels) -> bytes:
    """Encode [H, W, 3] uint8 as PNG with Pillow's default settings."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def longest_wait(work: Callable[[], object]) -> float:
    """Return the longest delay in milliseconds of a ticking thread while `work` runs on another thread."""
    worker = threading.Thread(target=work)
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        time.sleep(_TICK_SECONDS)
        now = time.perf_counter()
        longest, last = max(longest, now - last - _TICK_SECONDS), now
    return 1e3 * longest


if __name__ == "__main__":
    main()
