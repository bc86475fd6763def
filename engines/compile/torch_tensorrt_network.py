"""Converts a graph to a TensorRT network definition with Torch-TensorRT, an alternative to ONNX.

Torch-TensorRT compiles what it converts right away, for the current GPU, with its own settings and tensor names. Only
its conversion is used. The result is compiled in the same way as a network that was parsed from an ONNX file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engines.compile.interrupts import deferred
from engines.compile.planning.torch_tensorrt_package import distribution, installed_version
from engines.compile.programs import Program
from engines.errors import ConfigError, PidError
from engines.manifest import Package
from engines.pid.fp8 import FP8
from engines.runtime.trt import TensorRT

_CONVERSION = "torch_tensorrt.dynamo.conversion._conversion"
_CONSTANT_FOLDING = "torch_tensorrt.dynamo.lowering.passes.constant_folding"
_ROUND, _WEIGHT = torch.ops.pid.fp8_round.default, torch.ops.pid.fp8_weight.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DATA_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    FP8: "FP8",
}


class ConversionError(PidError):
    """Torch-TensorRT cannot convert a graph, or the result does not have the layers of the network."""

    code = "conversion-failed"


@dataclass(frozen=True)
class NetworkDefinition:
    """A TensorRT network to compile, and the object that owns its weights until then."""

    builder: Any
    network: Any
    weights: Any


@dataclass
class _Shared:
    """Tensors of a network that several operators share."""

    weights: dict[int, Any] = field(default_factory=dict)  # address of an FP8 weight -> constant
    rounded: dict[tuple[str, float], Any] = field(default_factory=dict)  # name of a tensor and scale -> FP8 tensor


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
    _register_converters(compiler)
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
            self.ctx.shared = _Shared()
            values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
            self._inputs = iter(tuple(zip(program.input_names, values, strict=True)))

        def placeholder(self, *_: Any) -> Any:
            name, value = next(self._inputs)
            shape = tuple(side if isinstance(side, int) else -1 for side in value.shape)
            return self.ctx.net.add_input(name, _data_type(compiler, value.dtype), shape)

        def run(self, *_args: Any, **_options: Any) -> Any:
            self._construct_trt_network_def()
            network = self.ctx.net
            for index, name in zip(range(network.num_outputs), program.output_names, strict=True):
                network.get_output(index).name = name
            found.append(NetworkDefinition(self.builder, network, self.ctx))
            return conversion.TRTInterpreterResult(SimpleNamespace(serialize=bytes), [], [], False, False)

    class Folder(folding._TorchTensorRTConstantFolder):
        """Leaves weights in FP8; dequantised ones would be constants in 16 bit."""

        def is_impure(self, node: torch.fx.Node) -> bool:
            return node.target is _WEIGHT or super().is_impure(node)

    with (
        _replaced(conversion, "TRTInterpreter", Interpreter),
        _replaced(folding, "_TorchTensorRTConstantFolder", Folder),
        _replaced(logger_user, "TRT_LOGGER", compiler.logger),
    ):
        yield found


@cache
def _register_converters(compiler: TensorRT) -> None:
    """Register converters for the two FP8 operators, and one for attention that never decomposes it."""
    registry: Any = importlib.import_module("torch_tensorrt.dynamo.conversion")
    converter, trt = partial(registry.dynamo_tensorrt_converter, supports_dynamic_shapes=True), compiler.module

    def constant(ctx: Any, value: Tensor, name: str) -> Any:
        value = value.detach().contiguous()
        ctx.record_weight(name, value)  # keeps it alive
        weights = trt.Weights(_data_type(compiler, value.dtype), value.data_ptr(), value.numel())
        return ctx.net.add_constant(tuple(value.shape), weights).get_output(0)

    @converter(_ROUND)
    def fp8_round(ctx: Any, _target: Any, args: tuple[Any, ...], _options: Any, name: str) -> Any:
        x, scale = args
        key = x.name, scale.item()
        factor = constant(ctx, scale.float(), f"{name}_scale")
        if key not in ctx.shared.rounded:
            ctx.shared.rounded[key] = ctx.net.add_quantize(x, factor, trt.DataType.FP8).get_output(0)
        return ctx.net.add_dequantize(ctx.shared.rounded[key], factor, x.dtype).get_output(0)

    @converter(_WEIGHT)
    def fp8_weight(ctx: Any, _target: Any, args: tuple[Any, ...], _options: Any, name: str) -> Any:
        weight, scale = args
        address = weight.data_ptr()
        if address not in ctx.shared.weights:
            ctx.shared.weights[address] = constant(ctx, weight, name)
        factors = constant(ctx, scale.float(), f"{name}_scale")
        layer = ctx.net.add_dequantize(ctx.shared.weights[address], factors, _data_type(compiler, scale.dtype))
        layer.axis = 0
        return layer.get_output(0)

    @converter(_ATTENTION, priority=registry.ConverterPriority.HIGH)
    def attention(ctx: Any, _target: Any, args: tuple[Any, ...], options: dict[str, Any], name: str) -> Any:
        query, key, value = args  # the network has no masks
        factor = options.get("scale") or query.shape[-1] ** -0.5
        if factor != 1:  # in float32, because the factor may not be exact in 16 bit
            scale = constant(ctx, torch.full((1,) * 4, factor), f"{name}_scale")
            product = trt.ElementWiseOperation.PROD
            wide = ctx.net.add_cast(query, trt.DataType.FLOAT).get_output(0)
            scaled = ctx.net.add_elementwise(wide, scale, product).get_output(0)
            query = ctx.net.add_cast(scaled, query.dtype).get_output(0)
        layer = ctx.net.add_attention(query, key, value, trt.AttentionNormalizationOp.SOFTMAX, False)  # not causal
        layer.name = layer.metadata = name  # the metadata is the name in the records of an engine
        return layer.get_output(0)


def _check_layers(network: Any, compiler: TensorRT, exported: torch.export.ExportedProgram, name: str) -> None:
    """Check that a network definition has the FP8 weights and attention operators of the exported graph.

    Raises:
        ConversionError: It does not.
    """
    trt, nodes = compiler.module, list(exported.graph.nodes)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    constants = [layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONSTANT]
    attentions = sum(layer.type == trt.LayerType.ATTENTION_OUTPUT for layer in layers)
    properties = (
        (
            "FP8 weights",
            constants.count(trt.DataType.FP8),
            len({node.args[0] for node in nodes if node.target is _WEIGHT}),
        ),
        ("attention operators", attentions, sum(node.target is _ATTENTION for node in nodes)),
    )
    for what, found, expected in properties:
        if found != expected:
            raise ConversionError(
                f"{name} changed the graph: the number of {what} should be {expected}, found {found}."
            )


def _data_type(compiler: TensorRT, dtype: torch.dtype) -> Any:
    return getattr(compiler.module.DataType, _DATA_TYPES[dtype])


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
