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
from engines.compile.programs import Program, describe_program
from engines.compile.torch_tensorrt_network import (
    ConversionError,
    NetworkDefinition,
    define_network,
    import_torch_tensorrt,
)
from engines.compile.variants import set_fp8_attention, shallow_copy, with_fp8
from engines.errors import ConfigError
from engines.pid import FoldedDecoder, fp8
from engines.pid.graphs import GRAPHS
from engines.runtime.trt import TensorRT, import_package
from engines.size import Size
from engines.size_profiles import size_profiles
from tests.engines.compile.networks import calibrated, network_of
from tests.tiny import TINY

SIZES, CAPTION_TOKENS, MAX_BATCH = (Size(96, 96), Size(64, 160)), 5, 2  # FP8 attention needs 32 tokens
RESULT = "result.json"


def network() -> FoldedDecoder:
    """Return the network to compile, in FP8, attention included, and bfloat16."""
    original = network_of(TINY)
    ranges = calibrated(original)
    quantised = with_fp8(original, ranges.inputs)
    set_fp8_attention(quantised, ranges.attentions)
    return shallow_copy(quantised, torch.bfloat16)


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
            with _definitions() as found:
                compile_engine(compiler, TARGETS["rtx5090"], graph, shapes, folder, folder / "timings", source)
            engine = _read(folder / file_name(graph, ".engine"))
            result.setdefault(name, {})[graph] = {**_describe(compiler, found[0].network), **engine}
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
    constants = [layer.get_output(0) for layer in layers if layer.type == kinds.CONSTANT]
    types = Counter(layer.type for layer in layers)

    def tensors(count: int, get: Any) -> dict[str, Any]:
        return {get(i).name: [get(i).dtype.name, tuple(get(i).shape)] for i in range(count)}

    return {
        "inputs": tensors(definition.num_inputs, definition.get_input),
        "outputs": tensors(definition.num_outputs, definition.get_output),
        "fp8_weights": sorted(tuple(tensor.shape) for tensor in constants if tensor.dtype.name == "FP8"),
        "roundings": types[kinds.QUANTIZE],
        "attentions": types[kinds.ATTENTION_OUTPUT],
    }


def _read(engine: Path) -> dict[str, Any]:
    return {"bytes": engine.stat().st_size, "kernels": Counter(map(str, read_kernel_records(engine)))}


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

    with mock.patch.object(torch_tensorrt_network, "_replaced", without_folder):
        weights = _conversion_error(fp8.quantise_layer(linear, 1.0))
    return {"operator": _conversion_error(_NotSupported()), "weights": weights}


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
