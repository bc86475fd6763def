"""The training photos of the bundled decoder: free wallpapers from Debian packages and scikit-image's samples.

    python -m engines.training.photos --data DIR [--measure]

fetches the packages with apt, shrinks every photo to several sizes and stores those as uint8 arrays under DIR. The
scaled-down sizes matter: wallpapers are soft at full size, and detail is what a decoder has to learn.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.bundled import dct
from engines.pixels import from_uint8

LONGEST = 1600  # pixels on the long side at full size
SCALES = (1.0, 0.7, 0.5, 0.35)  # of that; a size is kept while its short side fits a crop
SMALLEST = 400
CHOICE = 3  # training takes the most detailed of so many crops: much of a wallpaper is sky and blur


@dataclass(frozen=True)
class Source:
    """Photos of one origin and licence. `package` is a Debian package, or `scikit-image`."""

    package: str
    folder: str
    licence: str
    names: tuple[str, ...]


SOURCES = (
    Source(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds",
        "CC BY-SA 4.0",
        (
            "Bridge_by_Sander_Klootwijk.jpg",
            "Dragonfly_by_Bolly.jpg",
            "free_by_Peter_Nerlich.jpg",
            "greentock_by_Peter_Nerlich.jpg",
        ),
    ),
    Source(
        "lomiri-wallpapers-16.04",
        "usr/share/backgrounds",
        "CC BY 4.0",
        (
            "Picture_0B_by_freespace.jpg",
            "Picture_1A_by_freespace.jpg",
            "Wine_by_Jakkub_Mede.jpg",
            "aitzgorri_by_Aitzol_Berasategi.jpg",
            "friends_by_Aitzol_Berasategi.jpg",
            "life_by_Aitzol_Berasategi.jpg",
            "picosdeeuropa_by_Aitzol_Berasategi.jpg",
            "sunset_by_Aitzol_Berasategi.jpg",
        ),
    ),
    Source("lomiri-wallpapers-16.04", "usr/share/backgrounds", "CC0 1.0", ("seeding_by_Clements_Engelhardt.jpg",)),
    Source(
        "lomiri-wallpapers-20.04",
        "usr/share/backgrounds",
        "CC BY-SA 3.0",
        ("Infinite-Sea_by_Aury88.jpg", "Kleiber_by_Lukas_Baubkus.jpg", "Painting-Colors_by__herobrine7gamer.jpg"),
    ),
    Source(
        "mate-backgrounds",
        "usr/share/backgrounds/mate",
        "GPL 2 or later",
        (
            "abstract/Elephants_3840x2160.jpg",
            "nature/Aqua.jpg",
            "nature/Blinds.jpg",
            "nature/Dune.jpg",
            "nature/Garden.jpg",
            "nature/GreenMeadow.jpg",
            "nature/LadyBird.jpg",
            "nature/RainDrops.jpg",
            "nature/Storm.jpg",
            "nature/TwoWings.jpg",
            "nature/Wood.jpg",
            "nature/YellowFlower.jpg",
        ),
    ),
    Source(
        "plasma-workspace-wallpapers",
        "usr/share/wallpapers",
        "GPL 2 or later (package); LGPL 3 (each wallpaper's own metadata)",
        tuple(
            f"{name}/contents/images/2560x1600.jpg"
            for name in (
                "Autumn",
                "BytheWater",
                "ColdRipple",
                "ColorfulCups",
                "EveningGlow",
                "FallenLeaf",
                "Grey",
                "Kite",
                "OneStandsOut",
                "Path",
                "summer_1am",
            )
        ),
    ),
    Source(
        "plasma-workspace-wallpapers",
        "usr/share/wallpapers",
        "GPL 2 or later (package); CC BY-SA 4.0 (each wallpaper's own metadata)",
        tuple(
            f"{name}/contents/images/5120x2880.{kind}"
            for name, kind in (("Altai", "png"), ("Kay", "png"), ("SafeLanding", "jpg"), ("Volna", "jpg"))
        ),
    ),
    Source(
        "ukui-wallpapers",
        "usr/share/backgrounds",
        "CC BY-SA 3.0",
        ("2004default.jpg", "calla.png", "firstgeneration.jpg", "string.jpg"),
    ),
    Source("scikit-image", "", "public domain (NASA)", ("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg")),
    Source(
        "scikit-image",
        "",
        "CC0 1.0",
        ("chelsea.png", "coffee.png", "brick.png", "grass.png", "gravel.png", "retina.jpg"),
    ),
)
# Never trained on. The first is also the photo that ships with the project.
HELD_OUT = (
    "Picture_0B_by_freespace",
    "astronaut",
    "chelsea",
    "Garden",
    "picosdeeuropa_by_Aitzol_Berasategi",
    "EveningGlow",
)


def title(name: str) -> str:
    """The short name of a photo: its file's stem, or its folder where files are named by their size."""
    path = Path(name)
    return path.parts[0] if "contents" in path.parts else path.stem


def _root(source: Source, data: Path) -> Path:
    """The folder of a source's photos; downloads and unpacks the package where it is not there yet."""
    if source.package == "scikit-image":
        import skimage

        return Path(skimage.__file__).parent / "data"
    packages = (data / "packages").resolve()
    unpacked = packages / source.package
    if not unpacked.exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", source.package], cwd=packages, check=True)  # noqa: S603, S607
        (archive,) = packages.glob(f"{source.package}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], check=True)  # noqa: S603, S607
    return unpacked / source.folder


def _sizes(path: Path) -> Iterator[np.ndarray]:
    """One photo at every size worth cropping from, uint8 [H, W, 3], largest first."""
    photo = Image.open(path).convert("RGB")
    full = min(1.0, LONGEST / max(photo.size))
    for scale in SCALES:
        width, height = (round(side * full * scale) for side in photo.size)
        if scale < 1 and min(width, height) < SMALLEST:
            return
        yield np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))


def prepare(data: Path) -> None:
    """Fill DIR/photos with `<title>.<size index>.npy`; photos that are there already are left alone."""
    folder = data / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        root = _root(source, data)
        for name in source.names:
            if not (folder / f"{title(name)}.0.npy").exists():
                for i, pixels in enumerate(_sizes(root / name)):
                    np.save(folder / f"{title(name)}.{i}.npy", pixels)


def load(data: Path, held_out: bool) -> list[np.ndarray]:
    """All stored sizes of the training photos, or of the held-out ones: uint8 arrays [H, W, 3]."""
    files = sorted((data / "photos").glob("*.npy"))
    if not files:
        raise SystemExit(f"No photos in {data}: run `python -m engines.training.photos --data {data}` first.")
    return [np.load(file) for file in files if (file.name.split(".")[0] in HELD_OUT) == held_out]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.ascontiguousarray(pixels)))


def random_crop(photos: Sequence[np.ndarray], size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] from a random place, flipped and transposed at random; `size` (H, W) has to fit every photo."""
    photo = photos[int(random.integers(len(photos)))]
    if random.random() < 0.5:
        photo = photo.swapaxes(0, 1)
    photo = photo[:: random.choice((1, -1)), :: random.choice((1, -1))]
    top, left = (random.integers(have - want + 1) for have, want in zip(photo.shape, size, strict=False))
    return photo[top : top + size[0], left : left + size[1]]


def random_crops(
    photos: Sequence[np.ndarray], count: int, size: tuple[int, int], random: np.random.Generator, choice: int = 1
) -> Tensor:
    """float32 [count, 3, H, W] in [-1, 1], each the most detailed of `choice` random crops."""
    fitting = [photo for photo in photos if min(photo.shape[:2]) >= max(size)]
    crops = np.empty((count, *size, 3), np.uint8)
    for crop in crops:
        crop[:] = max((random_crop(fitting, size, random) for _ in range(choice)), key=_detail)
    return to_tensor(crops)


def _detail(pixels: np.ndarray) -> float:
    """Mean difference of neighbouring pixels of green, the most of what the eye sees: uint8 [H, W, 3]."""
    return float(np.abs(np.diff(pixels[..., 1].astype(np.int16), axis=0)).mean())


def measure(data: Path) -> Tensor:
    """Root mean square of every unscaled latent channel over random training crops, [16]."""
    crops = random_crops(load(data, held_out=False), 500, (256, 256), np.random.default_rng(0))
    latent = dct.encode(dct.downscale(crops)).double() * torch.tensor(dct.SCALES)[:, None, None]
    return latent.square().mean(dim=(0, 2, 3)).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for packages and photos")
    parser.add_argument("--measure", action="store_true", help="print the scales of the latent channels")
    options = parser.parse_args()
    prepare(options.data)
    if options.measure:
        print(", ".join(f"{scale:.3f}" for scale in measure(options.data).tolist()))


if __name__ == "__main__":
    main()
