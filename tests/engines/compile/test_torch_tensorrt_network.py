"""Real engines for the RTX 5090 by way of Torch-TensorRT, compared with those by way of ONNX.

They are compiled by another process, see `torch_tensorrt_without_gpu`. Engines cannot be loaded without a GPU, so the
networks that TensorRT is given, and the kernels that are named in the engine files, are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.compile.planning.torch_tensorrt_package import installed_version
from engines.errors import ConfigError
from engines.pid.fp4 import Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.graphs import GRAPHS, Graph, varying_specs
from engines.pid.quantised import quantised_layers
from tests.conftest import BuildOnce
from tests.engines.compile import torch_tensorrt_without_gpu as program
from tests.tiny import TINY

ROOT = Path(__file__).parents[3]


def run(build_once: BuildOnce, name: str, *options: str) -> dict[str, Any]:
    """Run the program once per test session and return what it wrote, see `torch_tensorrt_without_gpu.main`."""
    try:
        installed_version("tensorrt-rtx")
    except ConfigError as error:
        pytest.skip(str(error))

    def build(directory: Path) -> None:
        command = [sys.executable, "-m", program.__name__, str(directory), *options]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr

    result: dict[str, Any] = json.loads((build_once(name, build) / program.RESULT).read_text())
    return result


@pytest.fixture(scope="module")
def compiled(build_once: BuildOnce) -> dict[str, Any]:
    """Descriptions of the engines by way of Torch-TensorRT, and messages of errors."""
    return run(build_once, "torch-tensorrt")


@pytest.fixture(scope="module")
def compiled_twice(build_once: BuildOnce) -> dict[str, Any]:
    """The same, and descriptions of the engines by way of ONNX."""
    return run(build_once, "torch-tensorrt-and-onnx", "--onnx")


@pytest.mark.parametrize("graph", GRAPHS)
def test_engines_have_the_tensors_of_the_graph(compiled: dict[str, Any], graph: Graph):
    specs = varying_specs(graph, TINY, torch.bfloat16, program.CAPTION_TOKENS)
    names = {torch.float32: "FLOAT", torch.bfloat16: "BF16", torch.int64: "INT64"}
    for kind, is_input in (("inputs", True), ("outputs", False)):
        expected = {
            name: [names[spec.dtype], list(spec.shape)] for name, spec in specs.items() if spec.input == is_input
        }
        assert compiled["torch"][graph][kind] == expected


def test_weights_stay_in_fp4_and_fp8(compiled: dict[str, Any]):
    network = program.network()
    in_fp4, in_fp8 = (quantised_layers(network, kind).values() for kind in (Fp4Linear, Fp8Linear))
    assert len(in_fp4) > 10
    assert len(in_fp8) > 4
    fp4_shapes = [[layer.weight.shape[0], 2 * layer.weight.shape[1]] for layer in in_fp4]
    fp8_shapes = [list(tensor.shape) for tensor in (*(x.weight for x in in_fp8), *(x.block_scale for x in in_fp4))]
    assert compiled["torch"]["step"]["fp4_constants"] == sorted(fp4_shapes)
    assert compiled["torch"]["step"]["fp8_constants"] == sorted(fp8_shapes)


def test_the_engine_multiplies_by_each_fp4_weight_in_fp4(compiled: dict[str, Any]):
    network = program.network()
    expected = {}
    for name, layer in quantised_layers(network, Fp4Linear).items():
        uses = program.chunks(network) if name.startswith("pixel_blocks.") else 1
        names = [name, *(f"{name} {use}" for use in range(2, uses + 1))]
        expected |= dict.fromkeys(names, layer.weight.nbytes)
    assert "pixel_blocks.0.compress_to_attn 2" in expected
    assert compiled["torch"]["step"]["fp4_products"] == expected


def test_layers_with_the_same_input_share_its_rounding(compiled: dict[str, Any]):
    step = compiled["torch"]["step"]
    shared = {name for name in step["fp4_products"] if name.endswith(".w3")}  # the input of w1, which is in FP4
    assert len(shared) == 2
    assert step["fp4_roundings"] == len(step["fp4_products"]) - len(shared)


def test_each_attention_is_one_fp8_kernel_per_profile(compiled: dict[str, Any]):
    attentions = TINY.patch_depth + TINY.pixel_depth
    assert compiled["torch"]["step"]["attentions"] == attentions
    assert compiled["torch"]["step"]["kernels"] == {"Ada_qmma_e4m3_fp32": len(program.SIZES) * attentions}


def test_without_a_gpu_the_import_fails_with_the_reason(compiled: dict[str, Any]):
    assert "is installed but cannot be used: " in compiled["errors"]["import"]


def test_an_operator_without_a_converter_is_named(compiled: dict[str, Any]):
    message = compiled["errors"]["operator"]
    assert message.startswith("torch-tensorrt-rtx 2.")
    assert "cannot convert the graph: " in message
    assert "linalg_qr" in message
    assert "\n" not in message


def test_a_conversion_that_dequantises_the_weights_is_rejected(compiled: dict[str, Any]):
    assert "the number of FP4 weights should be 1, found 0" in compiled["errors"]["fp4"]
    assert "the number of FP8 weights and block scales should be 1, found 0" in compiled["errors"]["fp8"]


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
class TestBothCompilers:
    @pytest.mark.parametrize(
        "property_",
        [
            "inputs",
            "outputs",
            "fp4_constants",
            "fp8_constants",
            "fp4_roundings",
            "fp8_roundings",
            "fp4_products",
            "attentions",
            "kernels",
        ],
    )
    def test_are_given_the_same_network(self, compiled_twice: dict[str, Any], graph: Graph, property_: str):
        assert compiled_twice["torch"][graph][property_] == compiled_twice["onnx"][graph][property_]

    def test_make_engines_of_a_similar_size(self, compiled_twice: dict[str, Any], graph: Graph):
        expected = compiled_twice["onnx"][graph]["bytes"]
        assert compiled_twice["torch"][graph]["bytes"] == pytest.approx(expected, rel=0.25)
