"""Linear layers in FP8 (e4m3): weights are stored in FP8, inputs are rounded to it, sums are float32.

All scales are powers of two. In a floating-point format this loses no precision, and multiplying by a scale is exact
in every dtype, so that PyTorch, ONNX and TensorRT round the same values to the same eight bits.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.quantised_linear import QuantisedLinear

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
_MIN_EXPONENT = -24  # 2⁻²⁴ is the smallest power of two that float16 can represent
_TILE = 16  # FP8 tensor cores require matrix sides that are multiples of this


def power_of_two_scale(largest: Tensor) -> Tensor:
    """Return elementwise the smallest power of two s ≥ 2⁻²⁴ with largest / s ≤ FP8_MAX, in float32.

    It is exact on every device: computed from the bits of `largest`, because logarithms and powers are rounded, by some
    devices even for powers of two.

    Args:
        largest: Finite and not negative, of any float dtype and shape. The scale of 0 is 1.
    """
    largest = largest.double()  # no denormals, which a device may flush to zero
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa · 2^exponent, with 0.5 ≤ mantissa < 1
    limit, limit_exponent = math.frexp(FP8_MAX)
    exponent = (exponent - limit_exponent + (mantissa > limit)).clamp(_MIN_EXPONENT, 127)
    power = ((exponent + 127) << 23).view(torch.float32)  # float32: sign, 8 bits of exponent, mantissa
    return torch.where(largest > 0, power, 1.0)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Divide x, of any float dtype, by scale and round to the nearest e4m3 value; saturates."""
    return (x / scale.to(x.dtype)).clamp(-FP8_MAX, FP8_MAX).to(FP8)


# Custom operators, so that the export can translate them to QuantizeLinear and DequantizeLinear.


@torch.library.custom_op("pid::fp8_round", mutates_args=())
def fp8_round(x: Tensor, scale: Tensor) -> Tensor:
    """Round x to the values that FP8 can represent at `scale`, a scalar tensor; keeps shape and dtype."""
    return to_fp8(x, scale).to(x.dtype) * scale.to(x.dtype)


@fp8_round.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pid::fp8_weight", mutates_args=())
def fp8_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply an FP8 weight [out, in] by its scale [out]; the result has the dtype of the scale."""
    return weight.to(scale.dtype) * scale[:, None]


@fp8_weight.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=scale.dtype, device=weight.device)


class Fp8Linear(QuantisedLinear):
    """Linear layer with FP8 weights, one scale per output channel, and one static scale for its input.

    CUDA has FP8 matrix products from compute capability 8.9.

    Attributes:
        fast_accumulation: Whether the FP8 matrix product may sum with fewer bits than float32 has.
    """

    fast_accumulation: bool = False  # not a tensor: torch.compile treats it as a constant

    weight: Tensor  # [out, in] FP8
    weight_scale: Tensor  # [out] float32
    input_scale: Tensor  # scalar float32
    unit_scale: Tensor  # scalar float32 1: the matrix product requires a scale for the weights as well

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(outputs, bias)
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=FP8))
        self.register_buffer("weight_scale", torch.ones(outputs))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("unit_scale", torch.ones(()), persistent=False)

    @classmethod
    @torch.no_grad()
    def quantise(cls, layer: nn.Linear, largest_input: float) -> Self:
        """Quantise a linear layer.

        Inputs whose magnitude exceeds `largest_input`, rounded up so that the scale is a power of two, saturate.
        """
        with torch.device("meta"):
            result = cls(layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.detach()
        scale = power_of_two_scale(weight.abs().amax(dim=1).float())  # [out]
        state = {
            "weight": to_fp8(weight.float(), scale[:, None]),
            "weight_scale": scale,
            "input_scale": power_of_two_scale(torch.tensor(largest_input, device=weight.device)),
        }
        return result._filled(state, layer.bias)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # Loading with assign=True moves a layer from the meta device, except what is not in the state dictionary.
        self.unit_scale = torch.ones_like(self.input_scale)

    def round(self, x: Tensor) -> Tensor:
        """Round inputs x […, in] as the layer does; keeps shape and dtype."""
        return fp8_round(x, self.input_scale)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the values of the weight [out, in]."""
        return fp8_weight(self.weight, self.weight_scale.to(dtype))

    def has_product(self, device: torch.device) -> bool:
        """Return whether the device computes the product of this layer in FP8."""
        return self.has_tensor_core_sides and has_fp8_products(device)

    @property
    def has_tensor_core_sides(self) -> bool:
        """Whether FP8 tensor cores support the sides of the weight."""
        return not any(side % _TILE for side in self.weight.shape)

    def multiply(self, x: Tensor) -> Tensor:
        """Compute the FP8 matrix product; x is bfloat16 or float32."""
        return self.multiply_rounded(to_fp8(x, self.input_scale), x.dtype)

    def multiply_rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the product as `multiply` does, of inputs […, in] in FP8; the result has the given dtype."""
        product = self._multiply_rows(x, dtype) * self.weight_scale.to(dtype)
        return product if self.bias is None else product + self.bias

    def unscaled(self, x: Tensor) -> Tensor:
        """Map x as `forward` does, but without the scales of the output channels, and without the bias."""
        if self.has_product(x.device):
            return self._multiply_rows(to_fp8(x, self.input_scale), x.dtype)
        return F.linear(fp8_round(x, self.input_scale), self.weight.to(x.dtype))

    def _multiply_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.product(x.flatten(0, -2), dtype, self.fast_accumulation).unflatten(0, x.shape[:-1])

    def product(self, rows: Tensor, dtype: torch.dtype, fast_accumulation: bool) -> Tensor:
        """Multiply FP8 rows [N, in] by the input scale and the FP8 weight; the result [N, out] has the given dtype."""
        return torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.unit_scale,
            out_dtype=dtype,
            use_fast_accum=fast_accumulation,
        )


def has_fp8_products(device: torch.device) -> bool:
    """Return whether the device computes FP8 matrix products: CUDA from compute capability 8.9."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)  # torch.compile treats them as constants
    return (properties.major, properties.minor) >= (8, 9)
