"""Replaces the FP4 operators of an exported graph with operators that ONNX Runtime has, to verify the graph.

ONNX Runtime has neither numbers in e2m1 nor TensorRT's operator for dynamic quantisation. The replacements share no
code with the emulation in PyTorch, so that a mistake in one of them is detected: the package onnx decodes the weights,
and inputs are rounded by looking the numbers up in a table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.compile.export import FP4_QUANTIZE, require

_DOMAIN, _BLOCK = "pid", 16

# Blocks and numbers: x is […, in], with 16 numbers per block. A magnitude is rounded by counting the boundaries between
# e2m1 numbers below it; at a boundary the even number is chosen, so every other boundary counts as below itself.
_ROUND = """
<domain: "pid", opset_import: ["": 23]>
Fp4Round (x, scale) => (rounded) {
    wide = Cast <to = 1> (x)
    shape = Shape (wide)
    leading = Shape <end = -1> (wide)
    block = Constant <value_ints = [-1, 16]> ()
    block_shape = Concat <axis = 0> (leading, block)
    blocks = Reshape (wide, block_shape)
    magnitudes = Abs (blocks)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax (magnitudes, last)
    six = Constant <value_float = 6.0> ()
    by_six = Div (largest, six)
    unlimited = Div (by_six, scale)
    fp8_max = Constant <value_float = 448.0> ()
    limited = Min (unlimited, fp8_max)
    stored = Cast <to = 17> (limited)
    block_scale = Cast <to = 1> (stored)
    factors = Mul (block_scale, scale)
    zero = Constant <value_float = 0.0> ()
    positive = Greater (factors, zero)
    one = Constant <value_float = 1.0> ()
    divisors = Where (positive, factors, one)
    quotients = Div (magnitudes, divisors)
    column = Unsqueeze (quotients, last)
    odd = Constant <value_floats = [0.25, 1.25, 2.5, 5.0]> ()
    even = Constant <value_floats = [0.75, 1.75, 3.5]> ()
    above_odd = Greater (column, odd)
    above_even = GreaterOrEqual (column, even)
    above = Concat <axis = -1> (above_odd, above_even)
    counted = Cast <to = 7> (above)
    codes = ReduceSum <keepdims = 0> (counted, last)
    table = Constant <value_floats = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]> ()
    numbers = Gather (table, codes)
    signs = Sign (blocks)
    signed = Mul (numbers, signs)
    values = Mul (signed, factors)
    joined = Reshape (values, shape)
    rounded = CastLike (joined, x)
}
"""


@dataclass(frozen=True)
class RunnableGraph:
    """A graph that ONNX Runtime can run."""

    content: bytes  # the graph, which refers to the weights in the file next to it
    weights: Mapping[str, np.ndarray[Any, Any]]  # further ones, by name


def without_fp4(path: Path) -> RunnableGraph:
    """Return the graph in an ONNX file with dequantised FP4 weights, and without operators for FP4."""
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    weights = _dequantise_weights(onnx, model.graph, path.parent)
    if _replace_roundings(model.graph):
        model.functions.append(onnx.parser.parse_function(_ROUND))
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return RunnableGraph(model.SerializeToString(), weights)


def _dequantise_weights(onnx: Any, graph: Any, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Replace the dequantised FP4 weights by constants without content, and return their values."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    values: dict[str, np.ndarray[Any, Any]] = {}

    def content(name: str) -> np.ndarray[Any, Any]:
        found = onnx.numpy_helper.to_array(constants[name], os.fspath(folder))
        return np.asarray(found)

    for node in graph.node:
        weight = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT4E2M1:
            continue
        block_scale, scale = map(content, producers[node.input[1]].input)
        factors = block_scale.astype(np.float32) * scale.astype(np.float32)
        numbers = content(weight.name).astype(np.float32).reshape(*factors.shape, _BLOCK)
        dequantised = (numbers * factors[..., None]).reshape(tuple(weight.dims)).astype(scale.dtype)
        values[node.output[0]] = dequantised
        graph.initializer.append(_without_content(onnx, node.output[0], dequantised))
    _remove(graph, [producers[name] for name in values])
    return values


def _without_content(onnx: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    """Return a constant whose content ONNX Runtime is given when it loads the graph."""
    data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="in memory")
    return tensor


def _replace_roundings(graph: Any) -> bool:
    """Replace the roundings of inputs, which consist of a dynamic quantisation and the dequantisation of its results.

    Returns:
        Whether there were any.
    """
    quantised = {node.output[0]: node for node in graph.node if node.op_type == FP4_QUANTIZE}
    scales = {node.output[1] for node in quantised.values()}
    unused = [*quantised.values(), *(node for node in graph.node if node.input and node.input[0] in scales)]
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised:
            inputs = list(quantised[node.input[0]].input)
            node.op_type, node.domain = "Fp4Round", _DOMAIN
            del node.input[:], node.attribute[:]
            node.input.extend(inputs)
    _remove(graph, unused)
    return bool(quantised)


def _remove(graph: Any, nodes: Sequence[Any]) -> None:
    removed = {output for node in nodes for output in node.output}
    kept = [node for node in graph.node if not removed & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
