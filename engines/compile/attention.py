"""Prepares the attentions of a network that TensorRT has parsed, so that it can use its fused FP8 kernels.

TensorRT computes an attention in FP8 only if queries, keys and values come directly from DequantizeLinear and the
softmax is quantised with the scale 1/448, which ONNX cannot express. With only the former it dequantises and computes
in 16 bit, which costs time and gains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.compile.network_layers import all_layers, as_kind, producers
from engines.errors import PidError
from engines.pid.fp8_attention import NUMERATOR_SCALE

_NO_KERNEL = "not supported by a dedicated kernel"  # in TensorRT's message for an attention that it would decompose


class AttentionError(PidError):
    """An attention cannot be, or was not, compiled as requested."""

    code = "attention-differs"


@dataclass(frozen=True)
class RequestedAttention:
    """An attention of a network to compile."""

    name: str
    fp8: bool
    description: str  # of its layer in the records of an engine


@dataclass(frozen=True)
class PreparedAttentions:
    """The attentions of a network, and memory that TensorRT reads until the engine has been built."""

    requested: tuple[RequestedAttention, ...]  # in the order of execution
    constants: tuple[np.ndarray[Any, Any], ...]


def prepare_attentions(module: Any, network: Any) -> PreparedAttentions:
    """Quantise the softmax of each attention whose inputs are in FP8.

    Args:
        module: The TensorRT package.
        network: The parsed network, which is changed.

    Returns:
        The attentions; keep the result until the engine has been built.

    Raises:
        AttentionError: Only some inputs of an attention are in FP8, or a factor stands behind their rounding.
    """
    sources = producers(network)
    requested, constants = [], []
    for layer in all_layers(network):
        if layer.type != module.LayerType.ATTENTION_OUTPUT:
            continue
        attention = as_kind(layer, module.IAttentionOutputLayer).attention
        in_fp8 = [_comes_from_fp8(module, attention, index, sources) for index in range(3)]
        if any(in_fp8) != all(in_fp8):
            raise AttentionError(
                f"Only some of the queries, keys and values of the attention {attention.name} are in FP8. Please "
                "report this."
            )
        if all(in_fp8):
            constants.append(quantise_softmax(module, network, attention))
        requested.append(RequestedAttention(attention.name, all(in_fp8), attention.metadata or attention.name))
    return PreparedAttentions(tuple(requested), tuple(constants))


def quantise_softmax(module: Any, network: Any, attention: Any) -> np.ndarray[Any, Any]:
    """Round the numerators of an attention's softmax to FP8, at the scale 1/448.

    Returns:
        The scale, which must exist until the engine has been built.
    """
    import ml_dtypes

    dtype = attention.get_input(0).dtype
    numpy_dtypes = {"BF16": ml_dtypes.bfloat16, "HALF": np.float16, "FLOAT": np.float32}
    scale = np.array(NUMERATOR_SCALE, dtype=numpy_dtypes[dtype.name])
    constant = network.add_constant((), module.Weights(dtype, scale.ctypes.data, scale.size))
    attention.normalization_quantize_to_type = module.DataType.FP8
    attention.normalization_quantize_scale = constant.get_output(0)
    return scale


def explain_missing_kernel(error: str, requested: Sequence[RequestedAttention]) -> str | None:
    """Return what to do if TensorRT failed for lack of a fused attention kernel; None if it failed otherwise."""
    if _NO_KERNEL not in error:
        return None
    in_fp8 = [attention.name for attention in requested if attention.fp8]
    if not in_fp8:
        return "it has no fused kernel for an attention of this network. Use another --precision."
    names = in_fp8[0] if len(in_fp8) == 1 else f"{in_fp8[0]} to {in_fp8[-1]}"
    return f"it has no fused kernel for one of the attentions; those in FP8 are {names}. Use --attention 16bit."


def _comes_from_fp8(module: Any, attention: Any, index: int, sources: Mapping[str, Any]) -> bool:
    """Return whether an input of an attention is in FP8, after removing the parser's factor behind the rounding."""
    kinds = module.LayerType
    source = sources.get(attention.get_input(index).name)
    if source is not None and source.type == kinds.ELEMENTWISE:
        rounded = sources.get(source.get_input(0).name)
        if rounded is None or rounded.type != kinds.DEQUANTIZE:
            return False
        # The parser multiplies queries and keys by the root of the operator's scale, which is 1 for FP8.
        product = as_kind(source, module.IElementWiseLayer)
        if product.op != module.ElementWiseOperation.PROD or not _is_one(module, product.get_input(1), sources):
            raise AttentionError(
                f"The queries or keys of the attention {attention.name} are changed after they were rounded to FP8. "
                "Please report this."
            )
        attention.set_input(index, product.get_input(0))
        return True
    return source is not None and source.type == kinds.DEQUANTIZE


def _is_one(module: Any, tensor: Any, sources: Mapping[str, Any]) -> bool:
    """Return whether a tensor is a constant 1, perhaps cast to another dtype."""
    layer = sources.get(tensor.name)
    while layer is not None and layer.type == module.LayerType.CAST:
        layer = sources.get(layer.get_input(0).name)
    if layer is None or layer.type != module.LayerType.CONSTANT:
        return False
    return bool(np.all(np.asarray(as_kind(layer, module.IConstantLayer).weights) == 1))
