"""Chooses a precision for each linear layer, by the error that it causes alone and the images that all decode together.

The choice is between *mixtures*: assignments of precisions to layers, ordered from the smallest to the most accurate.
Each differs from the one before it in one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engines.manifest import LayerPrecision

Assignment = Mapping[str, LayerPrecision]  # of every layer that may be quantised


@dataclass(frozen=True)
class LayerErrors:
    """A layer that may be quantised: its size, and the velocity error that each precision causes."""

    parameters: int
    fp8: float
    fp4: float | None = None  # None: FP4 is not allowed


def mixtures(layers: Mapping[str, LayerErrors], fp4_share: float = 1.0) -> list[Assignment]:
    """Return the mixtures of precisions to choose from, the smallest first.

    All layers begin in FP4, or in FP8 where that is not allowed. Then they move to FP8, and after that to 16 bit, each
    time the one with the largest error first. In the last mixture, one layer is still in FP8.

    Args:
        layers: The layers; not empty.
        fp4_share: Maximum share of their weights in FP4.
    """
    current: dict[str, LayerPrecision] = {
        name: "fp8" if errors.fp4 is None else "fp4" for name, errors in layers.items()
    }
    found: list[Assignment] = [dict(current)]
    in_fp4 = {name: errors.fp4 for name, errors in layers.items() if errors.fp4 is not None}
    for name in sorted(in_fp4, key=in_fp4.__getitem__, reverse=True):
        current[name] = "fp8"
        found.append(dict(current))
    for name in sorted(layers, key=lambda name: layers[name].fp8, reverse=True)[:-1]:
        current[name] = "16bit"
        found.append(dict(current))
    return [mixture for mixture in found if share_in_fp4(mixture, layers) <= fp4_share]


def share_in_fp4(mixture: Assignment, layers: Mapping[str, LayerErrors]) -> float:
    """Return the share of the weights of `layers` that are in FP4."""
    in_fp4 = sum(layers[name].parameters for name, precision in mixture.items() if precision == "fp4")
    return in_fp4 / sum(errors.parameters for errors in layers.values())


def choose_mixture(candidates: Sequence[Assignment], minimum: float, psnr: Callable[[Assignment], float]) -> Assignment:
    """Return the first of `mixtures` whose images reach a minimum PSNR, or the last one if none does.

    A bisection, which assumes that the PSNR rises with every layer that is computed more accurately. Where it does not,
    a smaller mixture than the result may reach the minimum too.

    Args:
        candidates: The mixtures.
        minimum: Minimum mean PSNR of the calibration images, in dB.
        psnr: Measures a mixture.
    """
    without_fp4 = next(index for index, mixture in enumerate(candidates) if "fp4" not in mixture.values())
    below, reached = -1, len(candidates) - 1  # the last one is the result if no other reaches the minimum
    for guess in (0, without_fp4):
        if below < guess < reached:
            if psnr(candidates[guess]) >= minimum:
                reached = guess
            else:
                below = guess
    while reached - below > 1:
        middle = (below + reached) // 2
        if psnr(candidates[middle]) >= minimum:
            reached = middle
        else:
            below = middle
    return candidates[reached]


def describe_layers(fp4_layers: int, fp8_layers: int) -> str:
    """Describe how many layers are quantised."""
    counts = {"FP4": fp4_layers, "FP8": fp8_layers}
    return " and ".join(f"{count} layer{'s' * (count > 1)} in {name}" for name, count in counts.items() if count)
