"""Exported graphs: they have the structure of the network, and ONNX Runtime computes what PyTorch does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from engines.compile import verify_fold
from engines.compile.comparison import Comparison, compare
from engines.compile.compile_engine import EngineShapes, compile_engine
from engines.compile.export import ExportError, export
from engines.compile.inputs.calibrate import Ranges
from engines.compile.planning.targets import TARGETS, find_compiler
from engines.compile.variants import first_and_last_block, shallow_copy, with_quantised
from engines.compile.verify_engine import BackendGraphs, has_fused_attention, single_image_inputs
from engines.compile.verify_fold import VerificationError
from engines.compile.verify_onnx import GraphError, verify_graphs, verify_layer_kinds
from engines.pid import FoldedDecoder, PidConfig
from engines.pid.fp8_attention import AttentionRange, Fp8Attention
from engines.pid.sampler import MAX_STEPS, step_indices
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.torch_runtime import TorchBackend
from engines.size import Size
from engines.size_profiles import size_profiles
from tests.engines.compile.networks import V15, calibrated, ignore_progress, network_of
from tests.engines.runtime.runtimes import INFO
from tests.tiny import TINY

SIZE = Size(64, 96)


class TestExport:
    def test_a_step_supports_any_batch_and_contains_every_layer(self, tmp_path: Path):
        network = network_of(V15)
        ranges = calibrated(network)
        attentions = {name: found for name, found in ranges.attentions.items() if name != "patch_blocks.1.attn"}
        quantised = shallow_copy(with_quantised(network, ranges.inputs, attentions), torch.bfloat16)
        quantised.pixel_memory_budget = 1  # splits the pixel blocks into the maximum number of chunks
        exported = export(quantised, "step", SIZE, 5, 3, tmp_path)
        assert exported.operators["Gelu"] == 4 * V15.pixel_depth
        assert exported.operators["Attention"] == V15.patch_depth + V15.pixel_depth
        assert exported.operators["RMSNormalization"] > 0
        model = onnx.load(exported.path, load_external_data=False)
        names = [node.name for node in model.graph.node if node.op_type == "Attention"]
        assert names == list(ranges.attentions)  # TensorRT shows them in messages and engines
        shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
        assert shapes["x"] == shapes["noise"] == [0, 3, 0, 0]  # 0: dynamic
        assert shapes["tokens_2"] == [0, 0, 0, 48]
        weights = sum(tensor.nbytes for tensor in quantised.state_dict().values())
        assert exported.files[1].stat().st_size < weights + 10_000  # no position tables

    def test_a_graph_that_lost_a_layer_is_rejected(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        network = network_of(TINY)
        monkeypatch.setattr(FoldedDecoder, "velocity_at", lambda _self, x, rows, conditioning, sigma: x * 0.5)
        with pytest.raises(ExportError, match=r"step graph does not match the network: .* should be .*, found "):
            export(network, "step", SIZE, 5, 1, tmp_path)

    def test_a_graph_that_lost_the_rounding_of_an_attention_is_rejected(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        network = with_quantised(network_of(TINY), {}, {"patch_blocks.1.attn": AttentionRange(4.0, 4.0, 4.0)})
        monkeypatch.setattr(Fp8Attention, "forward", lambda _self, q, k, v: F.scaled_dot_product_attention(q, k, v))
        expected = r"attentions in FP8 should be \['patch_blocks.1.attn'\], found \[\]"
        with pytest.raises(ExportError, match=expected):
            export(network, "step", SIZE, 5, 1, tmp_path, fixed=True)


class TestVerification:
    def test_an_attention_in_fp8_computes_what_pytorch_does_without_rounded_numerators(self, tmp_path: Path):
        network = network_of(replace(TINY, patch_depth=1))
        ranges = Ranges({}, {"patch_blocks.0.attn": calibrated(network).attentions["patch_blocks.0.attn"]})
        (found,) = verify_layer_kinds(network, ranges, ("fp8",), tmp_path, ignore_progress)
        assert found.what == "patch_blocks.*.attn in FP8"
        assert 0 < max(found.velocity_error) <= found.tolerance < 0.01

    def test_at_every_size_only_rounding_errors_remain(self, tmp_path: Path):
        network = network_of(replace(V15, patch_depth=1))
        float32, float16 = verify_graphs(network, None, tmp_path, ignore_progress)
        assert {(size.height > size.width, size.height < size.width) for size in float32.sizes} == {
            (True, False),
            (False, True),
            (False, False),
        }
        assert 0 < max(float32.velocity_error) < 1e-5
        assert 0 < max(float16.velocity_error) < 1e-2
        assert not list(tmp_path.iterdir())

    def test_a_graph_that_computes_something_else_is_rejected(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        class WrongSession(onnxruntime.InferenceSession):
            def run(self, *arguments, **options):
                return [1.001 * array for array in super().run(*arguments, **options)]

        monkeypatch.setattr(onnxruntime, "InferenceSession", WrongSession)
        with pytest.raises(GraphError, match="ONNX Runtime and PyTorch differ by"):
            verify_graphs(network_of(replace(TINY, patch_depth=1)), None, tmp_path, ignore_progress)

    def test_a_graph_that_computes_nan_in_the_last_step_is_rejected(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        class NanSession(onnxruntime.InferenceSession):
            def run(self, names, inputs, *arguments, **options):
                factor = math.nan if step_indices(MAX_STEPS)[-1] in inputs.get("step_index", ()) else 1.0
                return [factor * array for array in super().run(names, inputs, *arguments, **options)]

        monkeypatch.setattr(onnxruntime, "InferenceSession", NanSession)
        with pytest.raises(VerificationError, match=r"ONNX Runtime \(float32, 32x64\) produces infinity or NaN"):
            verify_graphs(network_of(replace(TINY, patch_depth=1)), None, tmp_path, ignore_progress)

    def test_a_network_that_overflows_in_float16_is_compared_in_float32(self, tmp_path: Path):
        network = network_of(replace(TINY, patch_depth=1))
        with torch.no_grad():
            network.get_parameter("patch_blocks.0.mlp_x.w3.weight").mul_(3e4)
        lines: list[str] = []
        (found,) = verify_graphs(network, None, tmp_path, lines.append)
        assert found.what == "float32"
        assert lines[-1] == "skipped in float16, in which the network overflows"
        assert not list(tmp_path.iterdir())

    def test_first_and_last_block_keeps_their_weights(self):
        network = network_of(V15)
        small, names = first_and_last_block(network)
        assert small.config.patch_depth == 2
        assert names["patch_blocks.1.attn.qkv_y"] == "patch_blocks.2.attn.qkv_y"
        probe = verify_fold.make_probe(small.config)
        assert verify_fold.velocities(small, probe).isfinite().all()
        last = network.get_parameter("patch_blocks.2.mlp_x.w1.weight")
        assert torch.equal(small.get_parameter("patch_blocks.1.mlp_x.w1.weight"), last)


@pytest.mark.slow
def test_a_network_of_full_width_becomes_an_fp8_engine_for_the_rtx_5090(tmp_path: Path):
    """The widths of a released decoder with two blocks: FP8, verification in ONNX Runtime, and the engine file."""
    config = replace(PidConfig(), patch_depth=2, pixel_depth=1, caption_tokens=16, caption_width=64)
    network = network_of(config)
    ranges = calibrated(network, pixels=32)
    checked = ("patch_blocks.0.attn.qkv_x", "pixel_blocks.0.compress_to_attn")
    some = Ranges({name: ranges.inputs[name] for name in checked}, ranges.attentions)
    results = verify_layer_kinds(network, some, ("fp8", "fp4"), tmp_path, ignore_progress)
    assert [result.what.rsplit(" ", 1)[1] for result in results] == ["FP8"] * 4 + ["FP4"] * 2
    assert all(max(result.velocity_error) <= result.tolerance for result in results)

    quantised = shallow_copy(with_quantised(network, ranges.inputs, ranges.attentions), torch.bfloat16)
    size = Size(256, 256)
    exported = export(quantised, "step", size, config.caption_tokens, 2, tmp_path)
    target = TARGETS["rtx5090"]
    compiler = find_compiler(target, "tensorrt-rtx")
    shapes = EngineShapes(config, config.caption_tokens, size_profiles((size, Size(256, 384)), None), 2)
    engine = compile_engine(compiler, target, "step", shapes, tmp_path, tmp_path / "timings")
    step = {key: tensor for key, tensor in quantised.state_dict().items() if "lq_proj.latent_proj" not in key}
    weights = sum(tensor.nbytes for tensor in step.values())
    assert (tmp_path / "step.engine").stat().st_size == engine.bytes
    assert weights * 0.9 < engine.bytes < weights * 1.2  # the engine stores FP8 weights as FP8
    assert exported.nbytes < weights * 1.2
    assert [(attention.name, attention.kernels) for attention in engine.attentions] == [
        (name, ("Ada_qmma_e4m3_fp32",) * 2)
        for name in ("patch_blocks.0.attn", "patch_blocks.1.attn", "pixel_blocks.0.attn")
    ]


class TestComparisonOfBackends:
    """The comparison that runs on a GPU, here with two PyTorch backends on the CPU."""

    SIZE = Size(64, 64)

    def compare_with(self, other: FoldedDecoder) -> Comparison:
        network = network_of(V15)
        info = replace(INFO, caption_tokens=4, sizes=(self.SIZE,), max_batch=1, slots=1)
        backends = TorchBackend(network), TorchBackend(other)
        for backend in backends:
            backend.prepare(info, DeviceBuffers(backend.device))
        inputs = single_image_inputs(V15, self.SIZE, torch.zeros(1, 4, 24), torch.device("cpu"))
        reference, other_graphs = (BackendGraphs(backend, self.SIZE, 4) for backend in backends)
        return compare(reference, other_graphs, inputs, "The other")

    def test_identical_networks_do_not_differ(self):
        assert self.compare_with(network_of(V15)) == Comparison((0.0,) * 4, 99.0)

    def test_quantisation_is_visible_in_velocities_and_image(self):
        network = network_of(V15)
        ranges = calibrated(network)
        found = self.compare_with(with_quantised(network, ranges.inputs, ranges.attentions))
        assert all(1e-3 < error < 0.2 for error in found.velocity_error)
        assert 10 < found.image_psnr < 60

    def test_nan_is_an_error(self):
        network = network_of(V15)
        network.final_layer.linear.bias[0] = math.nan
        with pytest.raises(VerificationError, match="The other produces infinity or NaN"):
            self.compare_with(network)

    @pytest.mark.parametrize(("name", "fused"), [("_gemm_mha_v2_0x1", True), ("__myl_SoftMax_MatMul", False)])
    def test_fused_attention_is_detected_in_the_layer_information(self, name: str, fused: bool):
        information = json.dumps({"Layers": [{"Name": name}]})
        assert has_fused_attention(SimpleNamespace(layers=lambda _graph: information)) is fused
