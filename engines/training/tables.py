"""Markdown tables of the evaluation: all measurements at one size, and the targets with the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from engines.size import Size
from engines.training.metrics import Measurement

ORIGINAL, BICUBIC, ESRGAN = "original", "bicubic", "ESRGAN"
TARGET_SIGMA = 0.4  # at which the decoder must gain from being given sigma


class Key(NamedTuple):
    """Noise level and decoder of one measurement."""

    sigma: float
    decoder: str


Results = Mapping[Key, Measurement]


def student(steps: int, given_zero: bool = False) -> str:
    """Return the name of the student in the tables; `given_zero` if it is given sigma 0 whatever sigma is."""
    return f"student, {steps} step{'s' * (steps > 1)}{', given sigma 0' * given_zero}"


def measurements(results: Results) -> str:
    """Return the table of all measurements at one size."""
    lines = [
        "| sigma | decoded by | PSNR, dB | SSIM | sharpness | chroma noise | grid |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (sigma, decoder), values in results.items():
        psnr = f"{values.psnr:.2f}" if math.isfinite(values.psnr) else ""  # infinite for the original
        lines.append(
            f"| {sigma:g} | {decoder} | {psnr} | {values.ssim:.3f} | {values.sharpness:.2f} | "
            f"{values.chroma_noise:.2f} | {values.grid:.2f} |"
        )
    return "\n".join(lines)


def targets(results: Mapping[Size, Results]) -> str:
    """Return the table of the targets and of the results in four steps, with one column per size.

    The comparison with ESRGAN is left out if ESRGAN was not measured.
    """
    measured = set.intersection(*(set(each) for each in results.values()))
    rows = [row for row in _ROWS if row.name != _TO_ESRGAN or Key(0, ESRGAN) in measured]
    sizes = "".join(f" {size.height}×{size.width} |" for size in results)
    lines = [f"| | target |{sizes}", f"| --- | --- |{' --- |' * len(results)}"]
    lines += [
        f"| {row.name} | {row.target} |{''.join(f' {row.result(each)} |' for each in results.values())}" for row in rows
    ]
    return "\n".join(lines)


class _Row(NamedTuple):
    name: str
    target: str
    result: Callable[[Results], str]


def _decoded(results: Results) -> Measurement:
    return results[Key(0, student(4))]


def _sharpness_share(results: Results) -> str:
    bicubic = results[Key(0, BICUBIC)].sharpness
    return f"{(_decoded(results).sharpness - bicubic) / (1 - bicubic):.0%}".replace("%", " %")


def _psnr_gain(results: Results, baseline: str) -> str:
    return f"{_decoded(results).psnr - results[Key(0, baseline)].psnr:+.2f} dB"


def _sigma_gain(results: Results) -> str:
    right, wrong = (results[Key(TARGET_SIGMA, student(4, given_zero))].psnr for given_zero in (False, True))
    return f"{right - wrong:+.1f} dB"


_TO_ESRGAN = "sigma 0: PSNR relative to ESRGAN"
_ROWS = (
    _Row("sigma 0: sharpness, as a share of the distance from bicubic to the original", "≥ 50 %", _sharpness_share),
    _Row("sigma 0: PSNR relative to bicubic", "≥ -0.5 dB", lambda results: _psnr_gain(results, BICUBIC)),
    _Row(
        "sigma 0: SSIM relative to bicubic",
        "≥ 0",
        lambda results: f"{_decoded(results).ssim - results[Key(0, BICUBIC)].ssim:+.3f}",
    ),
    _Row("sigma 0: chroma noise", "≤ 1.2", lambda results: f"{_decoded(results).chroma_noise:.2f}"),
    _Row("sigma 0: grid", "within 5 % of 1", lambda results: f"{_decoded(results).grid:.2f}"),
    _Row(_TO_ESRGAN, "≥ 0 dB", lambda results: _psnr_gain(results, ESRGAN)),
    _Row(
        f"sigma {TARGET_SIGMA}: PSNR given sigma {TARGET_SIGMA}, relative to that given sigma 0", "≥ +3 dB", _sigma_gain
    ),
)
