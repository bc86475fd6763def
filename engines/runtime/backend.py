"""The part of a runtime on a device that differs between PyTorch and TensorRT: the two graphs of a decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engines.pid.config import PidConfig
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.kernels.choice import Choice
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.slots import LazyGather
from engines.size import Size


class Backend(Protocol):
    """Implementation of the two graphs of a decode (`engines.pid.graphs`).

    `condition` and `step` are captured as CUDA graphs, one per size and batch. They must not allocate memory outside
    the pool of a graph, wait for the device, or read Python state that changes between requests.
    """

    config: PidConfig
    dtype: torch.dtype  # of caption tokens and adapter tokens
    device: torch.device
    choices: Sequence[Choice]  # measurements by which `prepare` chose kernels

    def buffer_counts(self, info: RuntimeInfo) -> Mapping[str, int]:
        """Return the elements of the `DeviceBuffers` that only this backend uses, by name."""

    def prepare(self, info: RuntimeInfo, buffers: DeviceBuffers) -> None:
        """Allocate and choose everything that `condition` and `step` need. Called again on every warm-up.

        Args:
            info: Limits of the runtime.
            buffers: Memory in which `buffer_counts` is reserved; not yet allocated before the first warm-up.
        """

    def condition(self, size: Size, latent: Tensor, caption: Tensor) -> Sequence[Tensor]:
        """Run `ConditionGraph`. The inputs are buffers that never move."""

    def step(
        self,
        size: Size,
        x: Tensor,
        sigma: Tensor,
        step_index: Tensor,
        noise: Tensor,
        caption: Tensor,
        tokens: LazyGather,
    ) -> Tensor:
        """Run `StepGraph`. `step_index` and `noise` are buffers that never move."""

    def on_captured(self) -> None:
        """Complete the warm-up: called once all CUDA graphs have been captured."""
