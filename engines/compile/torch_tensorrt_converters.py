"""Converters for Torch-TensorRT: of the operators of quantised layers, and of attention, which it would decompose."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engines.pid.fp4 import BLOCK, FP4
from engines.pid.fp8 import FP8
from engines.runtime.trt import TensorRT

FP8_ROUND, FP8_WEIGHT = torch.ops.pid.fp8_round.default, torch.ops.pid.fp8_weight.default
FP4_ROUND, FP4_WEIGHT = torch.ops.pid.fp4_round.default, torch.ops.pid.fp4_weight.default
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DATA_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    FP8: "FP8",
    FP4: "FP4",
}


@dataclass
class SharedTensors:
    """Tensors of a network that several operators share."""

    constants: dict[int, Any] = field(default_factory=dict)  # address of a weight or of its block scales -> constant
    rounded: dict[tuple[str, str, float], Any] = field(default_factory=dict)  # type, name of a tensor, scale -> tensor


@cache
def register_converters(compiler: TensorRT) -> None:
    """Register converters for a TensorRT package. They need `SharedTensors` in the context of a conversion."""
    registry: Any = importlib.import_module("torch_tensorrt.dynamo.conversion")
    converters = _Converters(compiler)
    functions = {
        FP8_ROUND: converters.fp8_round,
        FP8_WEIGHT: converters.fp8_weight,
        FP4_ROUND: converters.fp4_round,
        FP4_WEIGHT: converters.fp4_weight,
        ATTENTION: converters.attention,
    }
    for operator, convert in functions.items():  # high priority: Torch-TensorRT has a converter for attention as well
        priority = registry.ConverterPriority.HIGH
        registry.dynamo_tensorrt_converter(operator, priority=priority, supports_dynamic_shapes=True)(convert)


def data_type(compiler: TensorRT, dtype: torch.dtype) -> Any:
    """Return TensorRT's name for a dtype of PyTorch."""
    return getattr(compiler.module.DataType, _DATA_TYPES[dtype])


class _Converters:
    """Functions that add the layers of an operator to a network.

    Torch-TensorRT calls them with the context of the conversion, the operator, its positional arguments and options,
    and the name of its node. A constant argument is a tensor of PyTorch, any other a tensor of the network.
    """

    def __init__(self, compiler: TensorRT) -> None:
        self._compiler, self._trt = compiler, compiler.module

    def fp8_round(self, ctx: Any, _target: Any, args: tuple[Any, ...], _options: Any, name: str) -> Any:
        x, scale = args
        key = "FP8", x.name, scale.item()
        if key not in ctx.shared.rounded:
            factor = self._constant(ctx, scale.float(), f"{name}_scale")
            numbers = ctx.net.add_quantize(x, factor, self._trt.DataType.FP8).get_output(0)
            ctx.shared.rounded[key] = ctx.net.add_dequantize(numbers, factor, x.dtype).get_output(0)
        return ctx.shared.rounded[key]

    def fp8_weight(self, ctx: Any, _target: Any, args: tuple[Any, ...], _options: Any, name: str) -> Any:
        weight, scale = args
        numbers = self._shared_constant(ctx, weight, name)
        factors = self._constant(ctx, scale.float(), f"{name}_scale")
        layer = ctx.net.add_dequantize(numbers, factors, data_type(self._compiler, scale.dtype))
        layer.axis = 0
        return layer.get_output(0)

    def fp4_round(self, ctx: Any, _target: Any, args: tuple[Any, ...], _options: Any, name: str) -> Any:
        x, scale = args
        key = "FP4", x.name, scale.item()
        if key not in ctx.shared.rounded:
            factor = self._constant(ctx, scale.float(), f"{name}_scale")
            types, axis = self._trt.DataType, len(x.shape) - 1
            layer = ctx.net.add_dynamic_quantize(x, axis, BLOCK, types.FP4, types.FP8)
            layer.set_input(1, factor)  # the block scales that it computes are in units of this
            numbers, block_scales = layer.get_output(0), layer.get_output(1)
            ctx.shared.rounded[key] = self._dequantise_fp4(ctx, numbers, block_scales, factor, x.dtype)
        return ctx.shared.rounded[key]

    def fp4_weight(self, ctx: Any, _target: Any, args: tuple[Any, ...], _options: Any, name: str) -> Any:
        weight, block_scale, scale = args
        numbers = self._shared_constant(ctx, weight, name)
        block_scales = self._shared_constant(ctx, block_scale, f"{name}_block_scale")
        factor = self._constant(ctx, scale.float(), f"{name}_scale")
        return self._dequantise_fp4(ctx, numbers, block_scales, factor, data_type(self._compiler, scale.dtype))

    def attention(self, ctx: Any, _target: Any, args: tuple[Any, ...], options: dict[str, Any], name: str) -> Any:
        trt = self._trt
        query, key, value = args  # the network has no masks
        factor = options.get("scale") or query.shape[-1] ** -0.5
        if factor != 1:  # in float32, because the factor may not be exact in 16 bit
            scale = self._constant(ctx, torch.full((1,) * 4, factor), f"{name}_scale")
            wide = ctx.net.add_cast(query, trt.DataType.FLOAT).get_output(0)
            scaled = ctx.net.add_elementwise(wide, scale, trt.ElementWiseOperation.PROD).get_output(0)
            query = ctx.net.add_cast(scaled, query.dtype).get_output(0)
        layer = ctx.net.add_attention(query, key, value, trt.AttentionNormalizationOp.SOFTMAX, False)  # not causal
        layer.name = layer.metadata = name  # the metadata is the name in the records of an engine
        return layer.get_output(0)

    @staticmethod
    def _dequantise_fp4(ctx: Any, numbers: Any, block_scales: Any, factor: Any, dtype: Any) -> Any:
        # TensorRT rejects factors of blocks whose dtype is not that of the result.
        factors = ctx.net.add_dequantize(block_scales, factor, dtype).get_output(0)
        return ctx.net.add_dequantize(numbers, factors, dtype).get_output(0)

    def _shared_constant(self, ctx: Any, value: Tensor, name: str) -> Any:
        """Add a constant, unless the network has it: in the pixel blocks each chunk has an operator for a weight."""
        address = value.data_ptr()
        if address not in ctx.shared.constants:
            ctx.shared.constants[address] = self._constant(ctx, value, name)
        return ctx.shared.constants[address]

    def _constant(self, ctx: Any, value: Tensor, name: str) -> Any:
        value = value.detach().contiguous()
        ctx.record_weight(name, value)  # keeps it alive
        shape, count = list(value.shape), value.numel()
        if value.dtype == FP4:  # PyTorch counts bytes, TensorRT the two numbers in each
            shape[-1], count = 2 * shape[-1], 2 * count
        weights = self._trt.Weights(data_type(self._compiler, value.dtype), value.data_ptr(), count)
        return ctx.net.add_constant(shape, weights).get_output(0)
