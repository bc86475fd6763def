"""What linear layers with less than 16 bits per weight have in common, whatever their format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantisedLinear(nn.Module, ABC):
    """Linear layer with quantised weights, whose inputs are rounded to the same format.

    On devices that multiply this format, it computes such a product. On other devices it multiplies the same rounded
    values in the dtype of the input, which differs only by rounding.
    """

    bias: Tensor | None

    def __init__(self, outputs: int, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    @classmethod
    @abstractmethod
    def quantise(cls, layer: nn.Linear, largest_input: float) -> Self:
        """Quantise a linear layer whose inputs have magnitudes of up to `largest_input`."""

    def _filled(self, state: dict[str, Tensor], bias: Tensor | None) -> Self:
        """Load a state dictionary without the bias, and the bias, into a layer on the meta device."""
        if bias is not None:
            state["bias"] = bias.detach()
        self.load_state_dict(state, strict=True, assign=True)
        return self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, in] to […, out] in the dtype of x."""
        if self.has_product(x.device):
            return self.multiply(x)
        return self.emulate(x)

    def emulate(self, x: Tensor) -> Tensor:
        """Multiply the rounded values in the dtype of x."""
        return F.linear(self.round(x), self.dequantised(x.dtype), self.bias)

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """Round inputs x […, in] as the layer does; keeps shape and dtype."""

    @abstractmethod
    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the values of the weight [out, in]."""

    @abstractmethod
    def has_product(self, device: torch.device) -> bool:
        """Return whether the device multiplies the format of this layer."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """Compute the product as `forward` does on a device that has it; x is bfloat16 or float32."""
