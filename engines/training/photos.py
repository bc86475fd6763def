"""Training photos of the bundled decoder (`photo_sources`): download, scaling and random crops.

    python -m engines.training.photos --data DIR [--compact DIR2] [--measure]

downloads the packages with apt, scales every photo to several sizes and stores those as uint8 arrays below DIR. The
scaled-down sizes matter: wallpapers are soft at full size, and detail is what a decoder has to learn. A compact copy in
DIR2 holds one JPEG file per photo instead, for training on another machine; its sizes are made when it is loaded.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.bundled import dct
from engines.cli import ArgumentParser
from engines.pixels import from_uint8
from engines.training import qt_resources
from engines.training.photo_sources import HELD_OUT, SCIKIT_IMAGE, SOURCES, Source, title

MAX_SIDE = 1600  # longest side in pixels at full size
SCALES = (1.0, 0.7, 0.5, 0.35)  # relative to that
MIN_SIDE = 400  # shortest side in pixels of a scaled-down size
COMPACT_SIDE, COMPACT_QUALITY = 1280, 85  # longest side and JPEG quality of a compact copy: all photos in 30 MB
CANDIDATES = 3  # half of the training crops are the most detailed of this many: much of a wallpaper is sky and blur


def _root(source: Source, data: Path) -> Path:
    """Return the folder of a source's photos; download and unpack its package first if necessary."""
    if source.package == SCIKIT_IMAGE:
        import skimage

        return Path(skimage.__file__).parent / "data"
    packages = (data / "packages").resolve()
    unpacked = packages / source.package
    if not unpacked.exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", source.package], cwd=packages, check=True)  # noqa: S603, S607
        (archive,) = packages.glob(f"{source.package}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], check=True)  # noqa: S603, S607
        for resources in unpacked.rglob("*.rcc"):
            qt_resources.unpack(resources, resources.with_suffix(""))
    return unpacked / source.folder


def _scaled(path: Path) -> Iterator[np.ndarray]:
    """Yield the photo of an image file at every size worth cropping from, uint8 [H, W, 3], largest first."""
    photo = Image.open(path).convert("RGB")
    full = min(1.0, MAX_SIDE / max(photo.size))
    for scale in SCALES:
        width, height = (round(side * full * scale) for side in photo.size)
        if scale < 1 and min(width, height) < MIN_SIDE:
            return
        yield np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))


def prepare(data: Path) -> None:
    """Fill DIR/photos with `<title>.<size index>.npy`; photos that exist already are skipped."""
    folder = data / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        root = _root(source, data)
        for name in source.names:
            if not (folder / f"{title(name)}.0.npy").exists():
                for i, pixels in enumerate(_scaled(root / name)):
                    np.save(folder / f"{title(name)}.{i}.npy", pixels)


def write_compact(data: Path, copy: Path) -> None:
    """Fill COPY/photos with `<title>.jpg`, made from the largest size of each prepared photo."""
    folder = copy / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (data / "photos").glob("*.0.npy"):
        photo = Image.fromarray(np.load(file))
        photo.thumbnail((COMPACT_SIDE, COMPACT_SIDE), Image.Resampling.LANCZOS)
        photo.save(folder / f"{_title(file)}.jpg", quality=COMPACT_QUALITY, subsampling=0, optimize=True)  # 4:4:4


def load(data: Path, held_out: bool) -> list[np.ndarray]:
    """Return all sizes of the training photos, or of the held-out ones, as uint8 arrays [H, W, 3].

    Args:
        data: Directory of prepared photos, or a compact copy of it.
        held_out: Which of the two sets to return.
    """
    files = sorted(file for file in (data / "photos").glob("*") if file.suffix in (".npy", ".jpg"))
    if not files:
        raise SystemExit(f"No photos in {data}; run `python -m engines.training.photos --data {data}` first.")
    chosen = (file for file in files if (_title(file) in HELD_OUT) == held_out)
    return [pixels for file in chosen for pixels in ([np.load(file)] if file.suffix == ".npy" else _scaled(file))]


def _title(file: Path) -> str:
    """Return the title of a photo that is stored in `file`."""
    return file.name.split(".")[0]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.ascontiguousarray(pixels)))


def random_crop(photos: Sequence[np.ndarray], size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Return uint8 [H, W, 3] from a random place, flipped and transposed at random; every photo must be that large."""
    photo = photos[int(random.integers(len(photos)))]
    if random.random() < 0.5:
        photo = photo.swapaxes(0, 1)
    photo = photo[:: random.choice((1, -1)), :: random.choice((1, -1))]
    top, left = (random.integers(have - want + 1) for have, want in zip(photo.shape, size, strict=False))
    return photo[top : top + size[0], left : left + size[1]]


def random_crops(
    photos: Sequence[np.ndarray], count: int, size: tuple[int, int], random: np.random.Generator, candidates: int = 1
) -> Tensor:
    """Return float32 [count, 3, H, W] in [-1, 1]; half of them, at random, are the most detailed of `candidates` crops.

    Photos that are smaller than `size` (H, W) in one direction or the other are not used.
    """
    fitting = [photo for photo in photos if min(photo.shape[:2]) >= max(size)]
    crops = np.empty((count, *size, 3), np.uint8)
    for crop in crops:
        number = candidates if random.random() < 0.5 else 1
        crop[:] = max((random_crop(fitting, size, random) for _ in range(number)), key=_detail)
    return to_tensor(crops)


def _detail(pixels: np.ndarray) -> float:
    """Return the mean difference of vertical neighbours in green, which dominates luma: uint8 [H, W, 3]."""
    return float(np.abs(np.diff(pixels[..., 1].astype(np.int16), axis=0)).mean())


def channel_rms(data: Path) -> Tensor:
    """Return the root mean square of every unscaled latent channel over random training crops, [16]."""
    crops = random_crops(load(data, held_out=False), 500, (256, 256), np.random.default_rng(0))
    latent = dct.encode(dct.downscale(crops)).double() * torch.tensor(dct.SCALES)[:, None, None]
    return latent.square().mean(dim=(0, 2, 3)).sqrt()


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(
        prog="python -m engines.training.photos",
        usage="%(prog)s --data DIR [--compact DIR] [--measure]",
        description="Download the training photos with apt, scale each to several sizes, and store them as arrays.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="directory for packages and photos (required)")
    add(
        "--compact",
        type=Path,
        metavar="DIR",
        help="also write a smaller copy of the photos as JPEG files, for training on another machine",
    )
    add("--measure", action="store_true", help="also print the scales of the latent channels")
    options = parser.parse_args()
    if options.compact and options.compact.resolve() == options.data.resolve():
        parser.error("--compact needs another directory than --data; it would store every photo twice")
    prepare(options.data)
    if options.compact:
        write_compact(options.data, options.compact)
    if options.measure:
        print(", ".join(f"{scale:.3f}" for scale in channel_rms(options.data).tolist()))


if __name__ == "__main__":
    main()
