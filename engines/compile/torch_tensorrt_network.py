"""Converts a graph to a TensorRT network definition with Torch-TensorRT, an alternative to ONNX.

Torch-TensorRT compiles what it converts right away, for the current GPU, with its own settings and tensor names. Only
its conversion is used. The result is compiled in the same way as a network that was parsed from an ONNX file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from engines.compile.interrupts import deferred
from engines.compile.network_layers import all_layers
from engines.compile.planning.torch_tensorrt_package import distribution, installed_version
from engines.compile.programs import Program
from engines.compile.torch_tensorrt_converters import (
    ATTENTION,
    FP4_WEIGHT,
    FP8_WEIGHT,
    SharedTensors,
    data_type,
    register_converters,
)
from engines.errors import ConfigError, PidError
from engines.manifest import Package
from engines.runtime.trt import TensorRT

_CONVERSION = "torch_tensorrt.dynamo.conversion._conversion"
_CONSTANT_FOLDING = "torch_tensorrt.dynamo.lowering.passes.constant_folding"
_LINEAR = re.compile(r"\[(?:decoder\.)?(?P<module>[\w.]+)/linear\w*\]$")  # in Torch-TensorRT's name of a matrix product


class ConversionError(PidError):
    """Torch-TensorRT cannot convert a graph, or the result does not have the layers of the network."""

    code = "conversion-failed"


@dataclass(frozen=True)
class NetworkDefinition:
    """A TensorRT network to compile, and the object that owns its weights until then."""

    builder: Any
    network: Any
    weights: Any


def define_network(compiler: TensorRT, program: Program) -> NetworkDefinition:
    """Convert a graph to a network definition. The names of its inputs and outputs are those of the program.

    Args:
        compiler: The TensorRT package that compiles the result.
        program: The graph; its module is on the CPU.

    Raises:
        ConfigError: Torch-TensorRT is missing or cannot be used.
        ConversionError: Torch-TensorRT rejects the graph, or its result does not have the layers of the network.
    """
    import_torch_tensorrt(compiler.package)
    convert = importlib.import_module("torch_tensorrt.dynamo").convert_exported_program_to_serialized_trt_engine
    name = f"{distribution(compiler.package)} {installed_version(compiler.package)}"
    register_converters(compiler)
    with deferred(), _quiet(), torch.no_grad():  # deferred: TensorRT logs through Python, which swallows exceptions
        try:
            exported = torch.export.export(
                program.module, program.inputs, dynamic_shapes=program.dynamic_shapes, strict=False
            )
            with _conversion_only(compiler, program) as found:
                convert(exported, arg_inputs=list(program.inputs), immutable_weights=True, offload_module_to_cpu=True)
        except Exception as error:  # of any type, as converters raise what they like
            raise ConversionError(f"{name} cannot convert the graph: {_reason(error)}.") from error
    (definition,) = found
    _check_layers(definition.network, compiler, exported, name)
    _name_products(definition.network, compiler)
    return definition


@cache
def import_torch_tensorrt(package: Package) -> None:
    """Import Torch-TensorRT for a TensorRT package. It asks CUDA for the current device.

    Raises:
        ConfigError: It is missing, does not match PyTorch, or cannot be imported.
    """
    version = installed_version(package)
    try:
        with _quiet():
            importlib.import_module("torch_tensorrt")
            modules = [importlib.import_module(name) for name in (_CONVERSION, _CONSTANT_FOLDING)]
            _ = modules[0].TRTInterpreter, modules[1]._TorchTensorRTConstantFolder
    except Exception as error:  # of any type: it raises a bare Exception if TensorRT cannot be imported
        message = f"{distribution(package)} {version} is installed but cannot be used: {_reason(error)}."
        raise ConfigError(message) from error
    finally:
        logging.captureWarnings(False)  # importing it redirects all warnings of the process to the log


@contextlib.contextmanager
def _conversion_only(compiler: TensorRT, program: Program) -> Iterator[list[NetworkDefinition]]:
    """Make Torch-TensorRT define a network, which is appended to the list, instead of compiling an engine."""
    conversion: Any = importlib.import_module(_CONVERSION)
    folding: Any = importlib.import_module(_CONSTANT_FOLDING)
    logger_user = sys.modules[conversion.TRTInterpreter.__module__]
    found: list[NetworkDefinition] = []

    class Interpreter(conversion.TRTInterpreter):
        """Names the inputs and outputs, and leaves dimensions that vary to the optimisation profiles."""

        def __init__(self, module: torch.fx.GraphModule, *args: Any, **options: Any) -> None:
            super().__init__(module, *args, **options)
            self.ctx.shared = SharedTensors()
            values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
            self._inputs = iter(tuple(zip(program.input_names, values, strict=True)))

        def placeholder(self, *_: Any) -> Any:
            name, value = next(self._inputs)
            shape = tuple(side if isinstance(side, int) else -1 for side in value.shape)
            return self.ctx.net.add_input(name, data_type(compiler, value.dtype), shape)

        def run(self, *_args: Any, **_options: Any) -> Any:
            self._construct_trt_network_def()
            network = self.ctx.net
            for index, name in zip(range(network.num_outputs), program.output_names, strict=True):
                network.get_output(index).name = name
            found.append(NetworkDefinition(self.builder, network, self.ctx))
            return conversion.TRTInterpreterResult(SimpleNamespace(serialize=bytes), [], [], False, False)

    class Folder(folding._TorchTensorRTConstantFolder):
        """Leaves weights in FP4 and FP8; dequantised ones would be constants in 16 bit."""

        def is_impure(self, node: torch.fx.Node) -> bool:
            return node.target in (FP4_WEIGHT, FP8_WEIGHT) or super().is_impure(node)

    with (
        _replaced(conversion, "TRTInterpreter", Interpreter),
        _replaced(folding, "_TorchTensorRTConstantFolder", Folder),
        _replaced(logger_user, "TRT_LOGGER", compiler.logger),
    ):
        yield found


def _check_layers(network: Any, compiler: TensorRT, exported: torch.export.ExportedProgram, name: str) -> None:
    """Check that a network definition has the quantised weights and attention operators of the exported graph.

    Raises:
        ConversionError: It does not.
    """
    trt, nodes = compiler.module, list(exported.graph.nodes)
    layers = all_layers(network)
    constants = [layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONSTANT]
    attentions = sum(layer.type == trt.LayerType.ATTENTION_OUTPUT for layer in layers)
    in_fp8 = {node.args[0] for node in nodes if node.target is FP8_WEIGHT}
    in_fp4 = {node.args[0] for node in nodes if node.target is FP4_WEIGHT}
    block_scales = {node.args[1] for node in nodes if node.target is FP4_WEIGHT}
    properties = (
        ("FP4 weights", constants.count(trt.DataType.FP4), len(in_fp4)),
        ("FP8 weights and block scales", constants.count(trt.DataType.FP8), len(in_fp8 | block_scales)),
        ("attention operators", attentions, sum(node.target is ATTENTION for node in nodes)),
    )
    for what, found, expected in properties:
        if found != expected:
            raise ConversionError(
                f"{name} changed the graph: the number of {what} should be {expected}, found {found}."
            )


def _name_products(network: Any, compiler: TensorRT) -> None:
    """Name the matrix products after the modules of the network, as in an ONNX file; messages and reports show them.

    A layer of the pixel blocks has a product per chunk. The names of all but the first have a number.
    """
    uses: Counter[str] = Counter()
    for layer in all_layers(network):
        found = _LINEAR.search(layer.name) if layer.type == compiler.module.LayerType.MATRIX_MULTIPLY else None
        if found is not None:
            module = found["module"]
            uses[module] += 1
            layer.name = module if uses[module] == 1 else f"{module} {uses[module]}"


def _reason(error: Exception) -> str:
    """Return the first line of an error's message; Torch-TensorRT wraps errors of converters in its own."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0].rstrip(".!") if lines else type(error).__name__


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages, which concern optional packages, deprecations, and errors that are raised anyway."""
    logger = logging.getLogger("torch_tensorrt")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
