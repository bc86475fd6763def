"""Linear layers in NVFP4: weights and inputs are e2m1 numbers with an e4m3 scale per 16 of them, sums are float32.

A value is e2m1 × block scale × tensor scale. Blocks are 16 consecutive numbers along the inputs of a layer. The tensor
scale is a float32 number for the whole tensor, which brings the block scales into the range of e4m3; it is a power of
two, so that the product of both scales with an e2m1 number is exact in bfloat16. Block scales of weights are stored,
those of inputs are computed from the inputs of each call.

The format is that of NVIDIA's block-scaled tensor cores: https://docs.nvidia.com/cuda/cublas/#narrow-precision-usage
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.fp8 import FP8, FP8_MAX, power_of_two_scale
from engines.pid.quantised_linear import QuantisedLinear

FP4 = torch.float4_e2m1fn_x2  # two numbers per byte, the first in the low bits
FP4_MAX = 6.0
BLOCK = 16  # numbers that share a scale
FP4_BYTES = 4.5 / 8  # per number, with its part of a block scale
HEADROOM = 16  # inputs may be this many times as large as those of the calibration; block scales have enough range
_WEIGHT_DIVISORS = (4, 4.5, 5, 5.5, 6, 6.5)  # block scales to try for weights: largest |weight| / divisor
_SCALE_TILE = (128, 4)  # rows and columns of block scales that tensor cores read together
_INPUTS_TILE = 64  # a tile has 4 block scales per row
_OUTPUTS_TILE = 16


def tensor_scale(largest: Tensor | float) -> Tensor:
    """Return the scale of a tensor whose largest magnitude is given: a power of two, float32, a scalar."""
    return power_of_two_scale(torch.as_tensor(largest) / FP4_MAX)


def block_scales(x: Tensor, scale: Tensor, divisor: float = FP4_MAX) -> Tensor:
    """Return the block scales of x […, in] for a tensor scale: largest magnitude / divisor, as e4m3 […, in / 16]."""
    largest = x.float().unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1)
    return (largest / divisor / scale).clamp(max=FP8_MAX).to(FP8)


def _steps(x: Tensor, block_scale: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Divide x […, in] by its scales; return the magnitudes […, blocks, 16] and the distances between e2m1 numbers.

    Rounding a magnitude to a multiple of its distance gives the nearest e2m1 number, and the even one of two.
    """
    factors = (block_scale.float() * scale).unsqueeze(-1)
    quotients = x.float().unflatten(-1, (-1, BLOCK)) / factors.where(factors > 0, torch.inf)
    magnitudes = quotients.abs().clamp(max=FP4_MAX)
    return magnitudes, torch.where(magnitudes < 2, 0.5, torch.where(magnitudes < 4, 1.0, 2.0))


def round_to_fp4(x: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """Round x […, in] to the nearest values with these scales; saturates. Keeps shape and dtype."""
    magnitudes, step = _steps(x, block_scale, scale)
    rounded = (magnitudes / step).round() * step * (block_scale.float() * scale).unsqueeze(-1)
    return rounded.flatten(-2).copysign(x.float()).to(x.dtype)


def to_fp4(x: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """Round x […, in] as `round_to_fp4` does, to e2m1 numbers […, in / 2]."""
    magnitudes, step = _steps(x, block_scale, scale)
    # The numbers are coded in ascending order: 0 0.5 1 1.5 | 2 3 | 4 6. At each bar, the distance doubles.
    codes = ((magnitudes / step).round() + 2 * step * (step >= 1)).flatten(-2).to(torch.uint8)
    codes = codes | (x.signbit().to(torch.uint8) << 3)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).view(FP4)


def from_fp4(packed: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """Return the values of numbers […, in / 2] with block scales […, in / 16], in the dtype of the tensor scale."""
    bits = packed.view(torch.uint8)
    codes = torch.stack((bits & 15, bits >> 4), dim=-1).flatten(-2)
    magnitudes = codes & 7  # the fourth bit is the sign
    step = torch.where(magnitudes < 4, 0.5, torch.where(magnitudes < 6, 1.0, 2.0))
    integers = (magnitudes & 1) + ((magnitudes >= 2).to(torch.uint8) << 1)
    numbers = integers * step  # no table, which a CUDA graph would copy to the device
    numbers = torch.where(codes < 8, numbers, -numbers).to(scale.dtype).unflatten(-1, (-1, BLOCK))
    factors = block_scale.to(scale.dtype) * scale
    return (numbers * factors.unsqueeze(-1)).flatten(-2)


def tile_scales(block_scale: Tensor) -> Tensor:
    """Order block scales [rows, columns] as tensor cores read them: in tiles of 128×4, padded with zeros; [numbers].

    In a tile, the four scales of row r are at 16 (r mod 32) + 4 (r div 32).
    """
    rows, columns = _SCALE_TILE
    bits = block_scale.view(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[1] % columns, 0, -bits.shape[0] % rows))
    tiles = bits.view(bits.shape[0] // rows, 4, rows // 4, bits.shape[1] // columns, columns)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(FP8)


# Custom operators, so that the export can translate them to what TensorRT calls dynamic quantisation.


@torch.library.custom_op("pid::fp4_round", mutates_args=())
def fp4_round(x: Tensor, scale: Tensor) -> Tensor:
    """Round x […, in] to FP4, with block scales that are computed from x; keeps shape and dtype."""
    return round_to_fp4(x, block_scales(x, scale), scale)


@fp4_round.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pid::fp4_weight", mutates_args=())
def fp4_weight(weight: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """Return the values of an FP4 weight [out, in / 2] as [out, in], in the dtype of the tensor scale."""
    return from_fp4(weight, block_scale, scale)


@fp4_weight.register_fake
def _(weight: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(weight.shape[0], 2 * weight.shape[1], dtype=scale.dtype, device=weight.device)


class Fp4Linear(QuantisedLinear):
    """Linear layer with FP4 weights, whose inputs are rounded to FP4 with a static tensor scale.

    CUDA has block-scaled FP4 matrix products from compute capability 10.0.
    """

    weight: Tensor  # [out, in / 2] FP4
    block_scale: Tensor  # [out, in / 16] FP8
    weight_scale: Tensor  # scalar float32
    input_scale: Tensor  # scalar float32
    tiled_scale: Tensor  # [numbers] FP8: `block_scale` as the matrix product reads it

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        """Make a layer of zeros; the number of inputs is a multiple of 16."""
        super().__init__(outputs, bias)
        self.register_buffer("weight", torch.zeros(outputs, inputs // 2, dtype=torch.uint8).view(FP4))
        self.register_buffer("block_scale", torch.zeros(outputs, inputs // BLOCK, dtype=FP8))
        self.register_buffer("weight_scale", torch.ones(()))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("tiled_scale", tile_scales(self.block_scale), persistent=False)

    @staticmethod
    def supports(layer: nn.Module) -> bool:
        """Return whether a module is a linear layer whose inputs can be divided into blocks."""
        return isinstance(layer, nn.Linear) and layer.in_features % BLOCK == 0

    @classmethod
    @torch.no_grad()
    def quantise(cls, layer: nn.Linear, largest_input: float) -> Self:
        """Quantise a linear layer.

        Each block of weights gets that one of a few scales with the least squared error. Inputs whose magnitude exceeds
        HEADROOM × `largest_input`, rounded up so that the scale is a power of two, saturate.
        """
        weight = layer.weight.detach().float()
        scale = tensor_scale(weight.abs().max())
        block_scale = _best_block_scales(weight, scale)
        with torch.device("meta"):
            result = cls(layer.in_features, layer.out_features, layer.bias is not None)
        state = {
            "weight": to_fp4(weight, block_scale, scale),
            "block_scale": block_scale,
            "weight_scale": scale,
            "input_scale": tensor_scale(HEADROOM * largest_input).to(weight.device),
        }
        return result._filled(state, layer.bias)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.tiled_scale = tile_scales(self.block_scale)

    def round(self, x: Tensor) -> Tensor:
        """Round inputs x […, in] as the layer does; keeps shape and dtype."""
        return fp4_round(x, self.input_scale)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the values of the weight [out, in]."""
        return fp4_weight(self.weight, self.block_scale, self.weight_scale.to(dtype))

    def has_product(self, device: torch.device) -> bool:
        """Return whether the device computes the product of this layer in FP4."""
        outputs, inputs = self.weight.shape[0], 2 * self.weight.shape[1]
        return not (inputs % _INPUTS_TILE or outputs % _OUTPUTS_TILE) and has_fp4_products(device)

    def multiply(self, x: Tensor) -> Tensor:
        """Compute the FP4 matrix product; x is bfloat16 or float32."""
        rows = x.flatten(0, -2)
        block_scale = block_scales(rows, self.input_scale)
        product = torch._scaled_mm(
            to_fp4(rows, block_scale, self.input_scale),
            self.weight.t(),
            scale_a=tile_scales(block_scale),
            scale_b=self.tiled_scale,
            out_dtype=x.dtype,
        )
        product = product.unflatten(0, x.shape[:-1]) * (self.input_scale * self.weight_scale).to(x.dtype)
        return product if self.bias is None else product + self.bias


def has_fp4_products(device: torch.device) -> bool:
    """Return whether the device computes FP4 matrix products: CUDA from compute capability 10.0."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)  # torch.compile treats them as constants
    return (properties.major, properties.minor) >= (10, 0)


def _best_block_scales(weight: Tensor, scale: Tensor) -> Tensor:
    """Return for each block of a weight [out, in] that one of a few scales with the least squared error."""
    best, least = block_scales(weight, scale), torch.full((), torch.inf, device=weight.device)
    for divisor in _WEIGHT_DIVISORS:
        candidate = block_scales(weight, scale, divisor)
        error = (round_to_fp4(weight, candidate, scale) - weight).unflatten(-1, (-1, BLOCK)).square().sum(dim=-1)
        best = torch.where(error < least, candidate.view(torch.uint8), best.view(torch.uint8)).view(FP8)
        least = torch.minimum(least, error)
    return best
