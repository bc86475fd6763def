"""What an operator asks of the builder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.manifest import Package, Precision
from engines.size import Size


@dataclass(frozen=True)
class BuildOptions:
    """None and () take the defaults of the decoder and the target."""

    decoder: str
    target: str
    output: Path
    checkpoint: Path | None = None
    random_seed: int | None = None  # random weights instead of a checkpoint
    precision: Precision | None = None
    sizes: tuple[Size, ...] = ()  # of the output
    max_batch: int = 1
    empty_caption: Path | None = None
    calibration: Path | None = None  # folder of latents
    keep: tuple[str, ...] = ()  # patterns of layers that are not quantised
    min_psnr: float = 35.0  # dB
    force: bool = False  # write a bundle below min_psnr too
    compiler: Package | None = None
    keep_onnx: bool = False
    overwrite: bool = False
