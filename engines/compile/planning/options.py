"""Options of a build, and the callback that reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.manifest import Precision
from engines.size import Size
from engines.size_profiles import SizeRange

AttentionOption = Literal["fp8", "16bit", "auto"]
Released = Literal["released"]
RELEASED: Released = "released"  # stands for all output sizes that the decoder is intended for
Compiler = Literal["tensorrt", "tensorrt-rtx", "torch-tensorrt"]  # the packages, or the one that uses either of them
Progress = Callable[[str, str], None]  # called with the name of a stage and what it does


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; None and () stand for the defaults of the decoder and the target."""

    decoder: str
    target: str
    output: Path
    checkpoint: Path | None = None
    random_seed: int | None = None  # random weights instead of a checkpoint
    precision: Precision | None = None
    sizes: tuple[Size | Released, ...] = ()  # output sizes
    size_range: SizeRange | None = None  # other output sizes that the engines can be used for
    max_batch: int = 1
    empty_caption: Path | None = None
    zero_caption: bool = False  # the empty caption of a released decoder may be zeros
    calibration: Path | None = None  # directory of latents
    keep: tuple[str, ...] = ()  # patterns of layers and attentions that are not quantised
    attention: AttentionOption | None = None  # None: auto; only for the precisions fp8 and fp4
    fp4_share: float | None = None  # maximum share of the weights in FP4; None: all; only for the precision fp4
    min_psnr: float = 35.0  # dB
    force: bool = False  # write the bundle even if it is below min_psnr
    compiler: Compiler | None = None
    keep_onnx: bool = False
    overwrite: bool = False
