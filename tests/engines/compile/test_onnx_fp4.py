"""FP4 operators in exported graphs: what replaces them for ONNX Runtime, compared with the specification of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engines.compile.export import FP4_QUANTIZE, TRT_DOMAIN
from engines.compile.onnx_fp4 import without_fp4

ROWS, INPUTS, OUTPUTS = 5, 64, 8
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
SCALE = np.float32(2.0**-6)


class DynamicQuantize(OpRun):
    """TensorRT's operator, as its documentation describes it, for ONNX's reference evaluator."""

    op_domain = TRT_DOMAIN

    def _run(self, x: Any, scale: Any, axis: int, block_size: int, scale_type: int) -> tuple[Any, Any]:
        assert (axis, block_size, scale_type) == (-1, 16, TensorProto.FLOAT8E4M3FN)
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        block_scale = np.minimum(np.abs(blocks).max(axis=-1) / np.float32(6) / scale, np.float32(448)).astype(E4M3)
        factors = (block_scale.astype(np.float32) * scale)[..., None]
        numbers = np.divide(blocks, factors, out=np.zeros_like(blocks), where=factors > 0).clip(-6, 6)
        return numbers.astype(E2M1).reshape(x.shape), block_scale


DynamicQuantize.__name__ = FP4_QUANTIZE  # the evaluator finds operators by name


def graph(path: Path, dtype: int) -> Any:
    """Write a product of rounded inputs with an FP4 weight, in the form in which a layer is exported."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((OUTPUTS, INPUTS)).astype(E2M1)
    bits = weight.view(np.uint8)
    packed = (bits[:, ::2] | (bits[:, 1::2] << 4)).tobytes()
    scales = np.abs(generator.standard_normal((OUTPUTS, INPUTS // 16)) * 100).astype(E4M3)
    as_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        helper.make_node(
            FP4_QUANTIZE,
            ["x", "scale"],
            ["q", "q_scale"],
            domain=TRT_DOMAIN,
            axis=-1,
            block_size=16,
            scale_type=TensorProto.FLOAT8E4M3FN,
        ),
        helper.make_node("DequantizeLinear", ["q_scale", "scale_cast"], ["q_factors"]),
        helper.make_node("DequantizeLinear", ["q", "q_factors"], ["rounded"], axis=-1, block_size=16),
        helper.make_node("DequantizeLinear", ["w_scale", "scale_cast"], ["w_factors"]),
        helper.make_node("DequantizeLinear", ["w", "w_factors"], ["values"], axis=-1, block_size=16),
        helper.make_node("Transpose", ["values"], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["rounded", "transposed"], ["y"]),
    ]
    constants = [
        helper.make_tensor("w", TensorProto.FLOAT4E2M1, [OUTPUTS, INPUTS], packed, raw=True),
        helper.make_tensor("w_scale", TensorProto.FLOAT8E4M3FN, list(scales.shape), scales.tobytes(), raw=True),
        numpy_helper.from_array(np.array(SCALE), "scale"),
        numpy_helper.from_array(np.array(SCALE, as_dtype), "scale_cast"),
    ]
    values = [
        helper.make_tensor_value_info(name, dtype, ["batch", "rows", width])
        for name, width in (("x", INPUTS), ("rounded", INPUTS), ("y", OUTPUTS))
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(TRT_DOMAIN, 1)]
    body = helper.make_graph(nodes, "layer", values[:1], values[1:], constants)
    model = helper.make_model(body, opset_imports=opsets, ir_version=11)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)
    return onnx.load(path)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16], ids=["float32", "float16"])
def test_the_replacement_computes_what_the_specification_says(dtype: int, tmp_path: Path):
    path = tmp_path / "layer.onnx"
    model = graph(path, dtype)
    generator = np.random.default_rng(1)
    magnitudes = np.logspace(-1, 1.2, INPUTS)
    x = (generator.standard_normal((2, ROWS, INPUTS)) * magnitudes).astype(helper.tensor_dtype_to_np_dtype(dtype))
    x[0, 0, :16] = 0
    x[0, 1, :16] = SCALE * np.array(
        (6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.25, -0.75, -1.25, -1.75, -2.5, -5, 0)
    )
    expected = ReferenceEvaluator(model, new_ops=[DynamicQuantize]).run(None, {"x": x})
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    runnable = without_fp4(path)
    assert list(runnable.weights) == ["values"]
    weights = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in runnable.weights.values()]
    options.add_external_initializers(list(runnable.weights), weights)
    session = onnxruntime.InferenceSession(runnable.content, options, providers=["CPUExecutionProvider"])
    rounded, product = session.run(None, {"x": x})
    np.testing.assert_array_equal(rounded, expected[0])
    tolerance = 1e-5 if dtype == TensorProto.FLOAT else 1e-2
    np.testing.assert_allclose(product, expected[1], rtol=tolerance, atol=tolerance * np.abs(expected[1]).max())
    assert (rounded != x).mean() > 0.8


def test_a_graph_without_fp4_stays_as_it_is(tmp_path: Path):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    model = helper.make_model(helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "abs", [value], [out]))
    onnx.save(model, tmp_path / "abs.onnx")
    runnable = without_fp4(tmp_path / "abs.onnx")
    assert (runnable.content, runnable.weights) == (model.SerializeToString(), {})
