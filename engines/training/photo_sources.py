"""Sources and licences of the training photos: wallpapers and others from Debian packages, and scikit-image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.training import gcompris_photos

SCIKIT_IMAGE = "scikit-image"


@dataclass(frozen=True)
class Source:
    """Photos of one origin and licence."""

    package: str  # Debian package, or SCIKIT_IMAGE
    folder: str  # within the package
    licence: str
    names: tuple[str, ...]  # paths within the folder


SOURCES = (
    *(
        Source(
            "gcompris-qt-data",
            f"usr/share/gcompris-qt/rcc/{activity}/gcompris/gcompris/src/activities/{activity}/{folder}",
            licence,
            tuple(f"{name}.webp" for name in names),
        )
        for (activity, folder, licence), names in gcompris_photos.PHOTOS.items()
    ),
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
        "lxqt-themes",
        "usr/share/lxqt/wallpapers",
        "LGPL 2.1 or later (package); CC BY-SA 3.0 (licence file of the wallpapers)",
        ("Butterfly-Kenneth-Wimer.jpg", "after-the-rain.jpg", "flowers.png", "this-is-not-windows.jpg"),
    ),
    Source(
        "mate-backgrounds",
        "usr/share/backgrounds/mate",
        "GPL 2 or later",
        (
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
        "palapeli-data",
        "usr/share/palapeli/collection",
        "GPL 2 or later (package); public domain (each photo's own metadata)",
        ("cincinnati-bridge.jpg", "citrus-fruits.jpg", "european-honey-bee.jpg"),
    ),
    Source(
        "plasma-workspace-wallpapers",
        "usr/share/wallpapers",
        "GPL 2 or later (package); LGPL 3 (each wallpaper's own metadata)",
        tuple(
            f"{name}/contents/images/2560x1600.jpg"
            for name in (
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
        "puzzle-jigsaw",
        "usr/share/puzzle-jigsaw/samples",
        "CC0 1.0",
        ("cat-animal-cat-portrait-mackerel.jpg", "pexels-photo-302304.jpeg"),
    ),
    Source("sddm-theme-maldives", "usr/share/sddm/themes/maldives", "CC BY 3.0", ("background.jpg",)),
    Source(
        "tuxpaint-data",
        "usr/share/tuxpaint/templates",
        "GPL 2 or later",
        (
            "burnt_bark.jpg",
            "cliff.jpg",
            "corn_maze.jpg",
            "lighthouse.jpg",
            "mossy_log.jpg",
            "mudstone.jpg",
            "ocean_splash.jpg",
            "ocean_waves.jpg",
            "redwoods_above.jpg",
            "rocks.jpg",
            "spiders_web.jpg",
            "sun_behind_leaves.jpg",
            "trees_above.jpg",
            "trees_at_dusk.jpg",
            "wool_mill_machine.jpg",
        ),
    ),
    Source(SCIKIT_IMAGE, "", "public domain (NASA)", ("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg")),
    Source(
        SCIKIT_IMAGE,
        "",
        "CC0 1.0",
        ("chelsea.png", "coffee.png", "brick.png", "grass.png", "gravel.png", "retina.jpg"),
    ),
)
# Titles of the photos that are never trained on. The first is also the photo that ships with the project.
HELD_OUT = (
    "Picture_0B_by_freespace",
    "astronaut",
    "chelsea",
    "Garden",
    "picosdeeuropa_by_Aitzol_Berasategi",
    "EveningGlow",
    "gorilla",
    "hawaMahal",
    "orchestra",
)


def title(name: str) -> str:
    """Return the short name of a photo: the stem of its file, or its folder if files are named by their size."""
    path = Path(name)
    return path.parts[0] if "contents" in path.parts else path.stem
