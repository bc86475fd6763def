"""Attention kernels of real engines for the RTX 5090, compiled by TensorRT for RTX from graphs of two attentions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.compile import attention as attention_module
from engines.compile.attention import (
    AttentionError,
    PreparedAttentions,
    RequestedAttention,
    explain_missing_kernel,
    prepare_attentions,
)
from engines.compile.describe_bundle import add_engine_warnings
from engines.compile.kernel_records import KernelRecord, check_kernels, names_fused_attention, read_kernel_records
from engines.compile.results import AttentionKernels, EngineResult
from engines.runtime.trt import import_package
from tests.tiny import manifest

NAMES = ("patch_blocks.0.attn", "pixel_blocks.0.attn")
HEAD_WIDTHS = dict(zip(NAMES, (64, 72), strict=True))
FP8, BF16 = "Ada_qmma_e4m3_fp32", "Ampere_hmma_bf16"


def attention_graph(
    path: Path, fp8: tuple[str, ...], tokens: int = 40, rounded: str = "qkv", scale: float | None = 1.0
) -> Path:
    """Write a graph with two attentions in bfloat16; those in `fp8` have the inputs in `rounded` rounded to FP8."""
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    step = helper.make_tensor(
        "step", TensorProto.BFLOAT16, [], np.array(1 / 64, ml_dtypes.bfloat16).tobytes(), raw=True
    )
    nodes, inputs, outputs = [], [], []
    for name, width in HEAD_WIDTHS.items():
        shape = ["batch", 2, tokens, width]
        sources = []
        for tensor in ("q", "k", "v"):
            source = f"{name}.{tensor}"
            inputs.append(helper.make_tensor_value_info(source, TensorProto.BFLOAT16, shape))
            if name in fp8 and tensor in rounded:
                nodes += [
                    helper.make_node("QuantizeLinear", [source, "step", "zero"], [f"{source}.fp8"]),
                    helper.make_node("DequantizeLinear", [f"{source}.fp8", "step"], [f"{source}.rounded"]),
                ]
                source = f"{source}.rounded"
            sources.append(source)
        attributes = {} if scale is None else {"scale": scale}
        nodes.append(helper.make_node("Attention", sources, [f"{name}.out"], name, **attributes))
        outputs.append(helper.make_tensor_value_info(f"{name}.out", TensorProto.BFLOAT16, shape))
    graph = helper.make_graph(nodes, "attentions", inputs, outputs, [zero, step])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@dataclass(frozen=True)
class Compiled:
    """Result of the calls that `compile_engine` makes; the engine is None if TensorRT failed."""

    attentions: PreparedAttentions
    engine: Path | None
    error: str


def compile_graph(graph: Path, batches: tuple[int, ...] = (1,)) -> Compiled:
    """Compile a graph with one optimisation profile per maximum batch."""
    tensorrt = import_package("tensorrt-rtx")
    module: Any = tensorrt.module
    builder = module.Builder(tensorrt.logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, tensorrt.logger)
    assert parser.parse_from_file(str(graph)), parser.get_error(0).desc()
    attentions = prepare_attentions(module, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(module.ComputeCapability.SM120, 0)
    for batch in batches:
        profile = builder.create_optimization_profile()
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *rest), (1, *rest), (batch, *rest))
        config.add_optimization_profile(profile)
    content = builder.build_serialized_network(network, config)
    if content is None:
        return Compiled(attentions, None, tensorrt.last_error)
    engine = graph.with_suffix(".engine")
    engine.write_bytes(memoryview(content))
    return Compiled(attentions, engine, "")


def found(compiled: Compiled, profiles: int = 1) -> list[tuple[bool, tuple[str, ...]]]:
    assert compiled.engine is not None
    records = read_kernel_records(compiled.engine)
    kernels = check_kernels(compiled.attentions.requested, records, profiles, "tensorrt-rtx")
    assert [attention.name for attention in kernels] == list(NAMES)
    return [(attention.fp8, attention.kernels) for attention in kernels]


class TestRealEngines:
    @pytest.mark.parametrize("fp8", [NAMES, NAMES[:1], NAMES[1:], ()], ids=["both", "patch", "pixel", "none"])
    def test_each_attention_has_a_kernel_of_the_requested_precision(self, fp8: tuple[str, ...], tmp_path: Path):
        compiled = compile_graph(attention_graph(tmp_path / "a.onnx", fp8))
        assert found(compiled) == [(name in fp8, (FP8 if name in fp8 else BF16,)) for name in NAMES]
        assert len(compiled.attentions.constants) == len(fp8)

    def test_every_profile_has_its_own_kernels(self, tmp_path: Path):
        compiled = compile_graph(attention_graph(tmp_path / "a.onnx", NAMES[:1], tokens=1100), batches=(1, 2, 4))
        assert found(compiled, profiles=3) == [(True, (FP8,) * 3), (False, (BF16,) * 3)]
        with pytest.raises(AttentionError, match=r"has 3 kernels for the attention patch_blocks.0.attn instead of 2"):
            found(compiled, profiles=2)

    def test_rounding_without_a_quantised_softmax_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """TensorRT then computes in 16 bit: all of the cost of FP8, and none of the gain."""
        monkeypatch.setattr(attention_module, "quantise_softmax", lambda *_: np.zeros(()))
        compiled = compile_graph(attention_graph(tmp_path / "a.onnx", NAMES[1:]))
        expected = f"pixel_blocks.0.attn was to be computed in FP8, but tensorrt-rtx compiled it to the kernel {BF16}"
        with pytest.raises(AttentionError, match=expected):
            found(compiled)

    def test_an_attention_without_a_fused_kernel_fails_with_advice(self, tmp_path: Path):
        compiled = compile_graph(attention_graph(tmp_path / "a.onnx", NAMES[1:], tokens=31))
        assert compiled.engine is None
        reason = explain_missing_kernel(compiled.error, compiled.attentions.requested)
        assert reason is not None
        assert reason.endswith("those in FP8 are pixel_blocks.0.attn. Use --attention 16bit.")
        assert compile_graph(attention_graph(tmp_path / "b.onnx", NAMES[1:], tokens=32)).engine is not None

    def test_an_attention_with_only_some_inputs_in_fp8_is_rejected(self, tmp_path: Path):
        with pytest.raises(AttentionError, match="Only some of the queries, keys and values of the attention patch"):
            compile_graph(attention_graph(tmp_path / "a.onnx", NAMES, rounded="qk"))

    @pytest.mark.parametrize("scale", [None, 0.5])
    def test_a_factor_after_the_rounding_is_rejected(self, scale: float | None, tmp_path: Path):
        """The parser applies the operator's scale to queries and keys."""
        with pytest.raises(AttentionError, match=r"patch_blocks\.0\.attn are changed after they were rounded to FP8"):
            compile_graph(attention_graph(tmp_path / "a.onnx", NAMES, scale=scale))


def requested(*fp8: bool) -> list[RequestedAttention]:
    return [RequestedAttention(str(i), value, f"[layer {i}]") for i, value in enumerate(fp8)]


def records(*kernels: str) -> Iterator[KernelRecord]:
    for i, kernel in enumerate(kernels):
        yield KernelRecord((kernel, kernel), ("[another layer]", f"[layer {i}]"))


class TestComparison:
    def test_fp8_that_was_not_requested_is_an_error(self):
        with pytest.raises(AttentionError, match=f"1 was to be computed in 16 bit, but tensorrt-rtx .* kernel {FP8}"):
            check_kernels(requested(True, False), list(records(FP8, FP8)), 1, "tensorrt-rtx")

    def test_a_kernel_with_one_product_in_fp8_is_an_error(self):
        half = KernelRecord((FP8, BF16), ("[layer 0]",))
        with pytest.raises(AttentionError, match=r"only one of its products in FP8: Ada_qmma_e4m3_fp32 \+ Ampere"):
            check_kernels(requested(True), [half], 1, "tensorrt-rtx")

    def test_a_kernel_of_no_attention_is_an_error(self):
        with pytest.raises(AttentionError, match="has 2 attention kernels, but 1 were expected"):
            check_kernels(requested(True), list(records(FP8, FP8)), 1, "tensorrt-rtx")

    def test_fp8_that_cannot_be_proven_is_an_error_for_tensorrt_for_rtx(self):
        with pytest.raises(AttentionError, match="has 0 kernels for the attention 0 instead of 2"):
            check_kernels(requested(True), [], 2, "tensorrt-rtx")
        (result,) = check_kernels(requested(False), [], 2, "tensorrt-rtx")
        assert result.kernels == ()

    def test_kernels_of_the_full_tensorrt_may_not_be_recognised(self):
        results = check_kernels(requested(True, False), [], 1, "tensorrt")
        assert [(result.fp8, result.kernels) for result in results] == [(True, ()), (False, ())]

    def test_a_manifest_warns_of_fp8_kernels_that_were_not_recognised(self):
        def warnings(*fp8: bool, recognised: bool) -> tuple[str, ...]:
            kernels = (FP8,) if recognised else ()
            found = [AttentionKernels(name=str(i), fp8=value, kernels=kernels) for i, value in enumerate(fp8)]
            engine = EngineResult(graph="step", bytes=1, seconds=1.0, attentions=tuple(found))
            return add_engine_warnings(manifest(), [engine]).warnings

        assert warnings(True, recognised=True) == warnings(False, recognised=False) == ()
        (warning,) = warnings(True, False, True, recognised=False)
        assert warning.startswith("The kernels of 2 FP8 attentions were not recognised")

    def test_a_file_without_kernels_has_no_records(self, tmp_path: Path):
        (tmp_path / "engine").write_bytes(b"engine")
        assert read_kernel_records(tmp_path / "engine") == ()

    @pytest.mark.parametrize(("name", "fused"), [("_gemm_mha_v2_0x1", True), ("__myl_SoftMax_MatMul", False)])
    def test_layer_information_names_fused_kernels(self, name: str, fused: bool):
        assert names_fused_attention(f'{{"Layers": [{{"Name": "{name}"}}]}}') is fused
