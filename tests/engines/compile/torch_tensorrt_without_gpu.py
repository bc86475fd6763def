"""Program that compiles graphs with Torch-TensorRT on a machine without a GPU, and the same ones from ONNX.

It pretends that there is an RTX 5090, which Torch-TensorRT asks for when it is imported. This must not happen in the
process of the tests, and neither may the import, which makes `import tensorrt` import TensorRT for RTX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from engines.compile import compile_engine as module
from engines.compile import torch_tensorrt_network
from engines.compile.compile_engine import EngineShapes, compile_engine
from engines.compile.export import export, file_name
from engines.compile.kernel_records import read_kernel_records
from engines.compile.planning.targets import TARGETS
from engines.compile.programs import Program, describe_program, pixel_chunks
from engines.compile.results import EngineResult
from engines.compile.torch_tensorrt_network import (
    ConversionError,
    NetworkDefinition,
    define_network,
    import_torch_tensorrt,
)
from engines.compile.variants import QuantisedLayers, set_fp8_attention, shallow_copy
from engines.errors import ConfigError
from engines.pid import FoldedDecoder
from engines.pid.fp4 import Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.graphs import GRAPHS
from engines.pid.quantised_linear import QuantisedLinear
from engines.runtime.trt import TensorRT, import_package
from engines.size import Size
from engines.size_profiles import size_profiles
from tests.engines.compile.networks import calibrated, network_of
from tests.tiny import TINY

SIZES, CAPTION_TOKENS, MAX_BATCH = (Size(96, 96), Size(64, 160)), 5, 2  # FP8 attention needs 32 tokens
RESULT = "result.json"


def network() -> FoldedDecoder:
    """Return the network to compile, in FP4, FP8 and bfloat16, with attention in FP8.

    Layers with the same input are in the first patch block in the same precision, in the last one in different ones.
    """
    original = network_of(TINY)
    ranges = calibrated(original)
    last = f"patch_blocks.{TINY.patch_depth - 1}."
    in_fp8 = {name for name in ranges.inputs if name.startswith(last) and not name.endswith(".w1")}
    quantised = QuantisedLayers(original, ranges.inputs).network(
        {name: "fp8" if name in in_fp8 else "fp4" for name in ranges.inputs}
    )
    set_fp8_attention(quantised, ranges.attentions)
    result = shallow_copy(quantised, torch.bfloat16)
    result.pixel_memory_budget = 1  # splits the pixel blocks into the maximum number of chunks
    return result


def chunks(network: FoldedDecoder) -> int:
    """Return how many chunks the pixel blocks of the network run in."""
    return pixel_chunks(network, SIZES[-1], MAX_BATCH)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Make Torch-TensorRT importable with a build of PyTorch without CUDA and without a GPU."""
    is_file = os.path.isfile
    patches = [
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(12, 0)),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
    ]
    if not torch.backends.cuda.is_built():  # the package's own libraries need those of PyTorch with CUDA
        patches += [
            mock.patch.object(os.path, "isfile", lambda path: "libtorchtrt" not in str(path) and is_file(path)),
            mock.patch.object(torch._C, "_CudaDeviceProperties", type("Properties", (), {}), create=True),
        ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def compile_graphs(folder: Path, with_onnx: bool) -> dict[str, Any]:
    """Compile both graphs with Torch-TensorRT, and perhaps from ONNX; return source -> graph -> description."""
    compiler, compiled = import_package("tensorrt-rtx"), network()
    shapes = EngineShapes(TINY, CAPTION_TOKENS, size_profiles(SIZES, None), MAX_BATCH)
    result: dict[str, Any] = {}
    for graph in GRAPHS:
        sources: dict[str, Program | None] = {"torch": describe_program(compiled, graph, CAPTION_TOKENS)}
        if with_onnx:
            export(compiled, graph, SIZES[-1], CAPTION_TOKENS, MAX_BATCH, folder)
            sources["onnx"] = None
        for name, source in sources.items():
            compiled.pixel_chunks = chunks(compiled)
            with _definitions() as found:
                engine = compile_engine(compiler, TARGETS["rtx5090"], graph, shapes, folder, folder / "timings", source)
            described = {
                **_describe(compiler, found[0].network),
                **_read(folder / file_name(graph, ".engine")),
                "fp4_products": _products(engine),
            }
            result.setdefault(name, {})[graph] = described
    return result


@contextlib.contextmanager
def _definitions() -> Iterator[list[NetworkDefinition]]:
    """Record the network definitions, which engines cannot be asked for without a GPU."""
    found: list[NetworkDefinition] = []

    def record(function: Any) -> Any:
        def recording(*arguments: Any) -> NetworkDefinition:
            found.append(function(*arguments))
            return found[-1]

        return recording

    with (
        mock.patch.object(module, "define_network", record(module.define_network)),
        mock.patch.object(module, "_parse", record(module._parse)),
    ):
        yield found


def _describe(compiler: TensorRT, definition: Any) -> dict[str, Any]:
    kinds = compiler.module.LayerType
    layers = [definition.get_layer(index) for index in range(definition.num_layers)]
    types = Counter(layer.type for layer in layers)

    def tensors(count: int, get: Any) -> dict[str, Any]:
        return {get(i).name: [get(i).dtype.name, tuple(get(i).shape)] for i in range(count)}

    def constants(dtype: str) -> list[tuple[int, ...]]:
        outputs = [layer.get_output(0) for layer in layers if layer.type == kinds.CONSTANT]
        return sorted(tuple(tensor.shape) for tensor in outputs if tensor.dtype.name == dtype)

    return {
        "inputs": tensors(definition.num_inputs, definition.get_input),
        "outputs": tensors(definition.num_outputs, definition.get_output),
        "fp4_constants": constants("FP4"),
        "fp8_constants": constants("FP8"),
        "fp4_roundings": types[kinds.DYNAMIC_QUANTIZE],
        "fp8_roundings": types[kinds.QUANTIZE],
        "attentions": types[kinds.ATTENTION_OUTPUT],
    }


def _read(engine: Path) -> dict[str, Any]:
    return {"bytes": engine.stat().st_size, "kernels": Counter(map(str, read_kernel_records(engine)))}


def _products(engine: EngineResult) -> dict[str, int]:
    """Return the bytes of the FP4 weight of each matrix product in which the engine has one."""
    return {product.name: product.bytes for product in engine.fp4_products if product.recognised}


def _import_error() -> str:
    try:
        import_torch_tensorrt("tensorrt-rtx")
    except ConfigError as error:
        return str(error)
    raise AssertionError("Torch-TensorRT was imported without a GPU")


def _conversion_error(module: nn.Module) -> str:
    inputs = (torch.ones(16, 16),)
    try:
        define_network(import_package("tensorrt-rtx"), Program(module, inputs, ({},), ("x",), ("y",)))
    except ConversionError as error:
        return str(error)
    raise AssertionError("the conversion did not fail")


class _NotSupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]


def _errors_of_conversions() -> dict[str, str]:
    linear = nn.Linear(16, 16)
    folding = importlib.import_module("torch_tensorrt.dynamo.lowering.passes.constant_folding")
    replaced = torch_tensorrt_network._replaced

    @contextlib.contextmanager
    def without_folder(module: Any, name: str, value: Any) -> Iterator[None]:
        with contextlib.nullcontext() if module is folding else replaced(module, name, value):
            yield

    kinds: dict[str, type[QuantisedLinear]] = {"fp4": Fp4Linear, "fp8": Fp8Linear}
    with mock.patch.object(torch_tensorrt_network, "_replaced", without_folder):
        weights = {name: _conversion_error(kind.quantise(linear, 1.0)) for name, kind in kinds.items()}
    return {"operator": _conversion_error(_NotSupported()), **weights}


def main(directory: Path, with_onnx: bool) -> None:
    """Write descriptions of engines, and messages of errors, to a file in `directory`."""
    errors = {"import": _import_error()}
    with pretended_gpu():
        import_torch_tensorrt("tensorrt-rtx")
        result = {**compile_graphs(directory, with_onnx), "errors": {**errors, **_errors_of_conversions()}}
    (directory / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), "--onnx" in sys.argv)
