"""Linear layers in FP8 (e4m3): weights stored so, activations rounded on the way in, sums in float32.

All scales are powers of two. For a floating-point format that costs no precision, and it makes every product with a
scale exact in every dtype, so that PyTorch, ONNX and TensorRT round the same values to the same eight bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
_MIN_SCALE = 2.0**-24  # the smallest power of two that float16 can hold
_TILE = 16  # matrix sides that FP8 tensor cores take are multiples of this


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The least power of two s with largest / s at most FP8_MAX, elementwise, float32; 1 where `largest` is 0."""
    exponent = torch.ceil(torch.log2(largest.double() / FP8_MAX)).float()
    return torch.where(largest > 0, torch.exp2(exponent).clamp(min=_MIN_SCALE), 1.0)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, rounded to the nearest e4m3 value and saturated; any float dtype in, FP8 out."""
    return (x / scale.to(x.dtype)).clamp(-FP8_MAX, FP8_MAX).to(FP8)


# As operators of their own these two survive an export, and become QuantizeLinear and DequantizeLinear there.


@torch.library.custom_op("pid::fp8_round", mutates_args=())
def fp8_round(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to multiples that FP8 can hold at `scale` (a scalar tensor); shape and dtype of x."""
    return to_fp8(x, scale).to(x.dtype) * scale.to(x.dtype)


@fp8_round.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pid::fp8_weight", mutates_args=())
def fp8_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [out, in] in FP8 times scale [out], in the scale's dtype."""
    return weight.to(scale.dtype) * scale[:, None]


@fp8_weight.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=scale.dtype, device=weight.device)


class Fp8Linear(nn.Module):
    """A linear layer with FP8 weights, a scale for each output channel, and one static scale for its input.

    On CUDA of compute capability 8.9 and above it is an FP8 matrix product. Elsewhere the same rounded values are
    multiplied in the input's dtype, which differs in the order of summation alone.
    """

    weight: Tensor  # [out, in] FP8
    weight_scale: Tensor  # [out] float32
    input_scale: Tensor  # scalar float32
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=FP8))
        self.register_buffer("weight_scale", torch.ones(outputs))
        self.register_buffer("input_scale", torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out] in x's dtype."""
        if _has_fp8_products(x.device) and not any(side % _TILE for side in self.weight.shape):
            return self.multiply(x)
        weight = fp8_weight(self.weight, self.weight_scale.to(x.dtype))
        return F.linear(fp8_round(x, self.input_scale), weight, self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """The FP8 matrix product; x is bfloat16 or float32."""
        rows = to_fp8(x, self.input_scale).flatten(0, -2)  # [N, in]
        one = torch.ones_like(self.input_scale)
        product = torch._scaled_mm(rows, self.weight.t(), scale_a=self.input_scale, scale_b=one, out_dtype=x.dtype)
        product = product.unflatten(0, x.shape[:-1]) * self.weight_scale.to(x.dtype)
        return product if self.bias is None else product + self.bias


def _has_fp8_products(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)  # torch.compile takes it for the constant that it is
    return (properties.major, properties.minor) >= (8, 9)


def quantised(layer: nn.Linear, largest_input: float) -> Fp8Linear:
    """`layer` in FP8; inputs beyond ±largest_input (rounded up to a power of two of steps) will saturate."""
    with torch.device("meta"):
        result = Fp8Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight = layer.weight.detach()
    scale = power_of_two_scale(weight.abs().amax(dim=1).float())  # [out]
    state = {
        "weight": to_fp8(weight.float(), scale[:, None]),
        "weight_scale": scale,
        "input_scale": power_of_two_scale(torch.tensor(largest_input, device=weight.device)),
    }
    if layer.bias is not None:
        state["bias"] = layer.bias.detach()
    result.load_state_dict(state, strict=True, assign=True)
    return result.requires_grad_(False)


@torch.no_grad()
def quantise(network: nn.Module, largest_inputs: Mapping[str, float]) -> None:
    """Replace the linear layers named in `largest_inputs` in place; each value is the largest |input| to expect."""
    for name, largest in largest_inputs.items():
        layer = network.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}, no linear layer.")
        network.set_submodule(name, quantised(layer, largest))


def replace_with_fp8_layers(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace those linear layers of a network by FP8 ones, in place, that are FP8 in a state dictionary."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.input_scale" in state:
            with torch.device(layer.weight.device):
                room = Fp8Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            network.set_submodule(name, room)
