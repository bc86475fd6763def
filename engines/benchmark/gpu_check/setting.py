"""What is measured: a network, sizes and batches; full-size, or a toy that shows that everything runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engines.bundle import DTYPES
from engines.compile.load import random_decoder
from engines.compile.plan import describe
from engines.compile.verify_fold import cast
from engines.pid import FoldedDecoder, fold
from engines.pid.released import DecoderDescription
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.pid.toy import TOY
from engines.size import Size

Row = dict[str, Any]  # of a table; or one of "note", "skipped", "failed" with a sentence


@dataclass(frozen=True)
class Setting:
    """One run's choices, and until when a part of it may take."""

    device: torch.device
    small: bool = False
    bundle: Path | None = None  # of TensorRT engines
    seconds: float = float("inf")  # that this part has
    _began: float = field(default_factory=time.monotonic)

    @property
    def description(self) -> DecoderDescription:
        return TOY if self.small else describe("flux-2kto4k-v1.5")

    @property
    def sizes(self) -> tuple[Size, ...]:
        small, full = (Size(32, 32), Size(64, 64), Size(64, 96)), (Size(1024, 1024), Size(2048, 2048), Size(4096, 4096))
        return small if self.small else full

    @property
    def main_size(self) -> Size:
        """That of all measurements which are made at one size."""
        return self.sizes[1]

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.small else (1, 2, 4)

    @property
    def left(self) -> float:
        """Seconds that this part still has."""
        return self.seconds - (time.monotonic() - self._began)


@dataclass(frozen=True)
class Part:
    """One table of the report."""

    name: str
    title: str
    share: float  # seconds on one GPU; what it does not use, later parts may
    run: Callable[[Setting], Iterator[Row]]
    only_on_cuda: bool = False


def folded_network(setting: Setting) -> FoldedDecoder:
    """Random weights in bf16, drawn on the device."""
    folded = fold(random_decoder(setting.description.config, 0, setting.device), MODEL_TIMESTEPS)
    cast(folded, DTYPES["bf16"])
    return folded
