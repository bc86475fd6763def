"""Exports the two graphs to ONNX: torch.export, then opset 23 with quantised layers as operators that TensorRT knows.

Each graph is exported once, with a dynamic height, width and batch. The structure of every exported graph is checked
against the network.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from engines.bundle import writing
from engines.compile.programs import Program, describe_program, pixel_chunks
from engines.errors import ConfigError, PidError
from engines.pid import FoldedDecoder
from engines.pid.blocks import attentions
from engines.pid.fp4 import BLOCK, Fp4Linear
from engines.pid.fp8 import Fp8Linear
from engines.pid.graphs import Graph
from engines.pid.quantised import quantised_layers
from engines.size import Size

_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's record of the modules around an operator, and its name
_CLASSES = "pkg.torch.onnx.class_hierarchy"
OPSET = 23  # the first with Attention and RMSNormalization, which TensorRT imports as single operators
TRT_DOMAIN, FP4_QUANTIZE = "trt", "TRT_FP4DynamicQuantize"


class ExportError(PidError):
    """The graph could not be exported, or does not have the structure of the network."""

    code = "export-failed"


@dataclass(frozen=True)
class ExportedGraph:
    """An ONNX file and its weights."""

    graph: Graph
    path: Path  # the .onnx file; its weights are in <name>.data next to it
    operators: Mapping[str, int]  # operator type -> number of nodes

    @property
    def files(self) -> tuple[Path, Path]:
        """Paths of the graph and of its weights."""
        return self.path, self.path.with_name(f"{self.path.name}.data")

    @property
    def nbytes(self) -> int:
        """Size of both files in bytes."""
        return sum(file.stat().st_size for file in self.files)


def require(package: str) -> ModuleType:
    """Import an optional package of the builder.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"Compiling engines needs the Python package {package}: pip install 'pid-decode-server[engines]'."
        ) from error


def file_name(graph: Graph, suffix: str) -> str:
    """Return the name of a graph's file in the workspace and in the bundle."""
    return f"{graph}{suffix}"


def onnx_files(graph: Graph) -> tuple[str, str]:
    """Return the names of the files of an exported graph: the graph itself, and its weights."""
    name = file_name(graph, ".onnx")
    return name, f"{name}.data"


def export(
    network: FoldedDecoder,
    graph: Graph,
    largest: Size,
    caption_tokens: int,
    max_batch: int,
    folder: Path,
    fixed: bool = False,
) -> ExportedGraph:
    """Export one graph of a network, for all output sizes and batches.

    Args:
        network: On the CPU; the graph has its dtype.
        graph: A condition graph supports one image, a step graph any batch.
        largest: The output size with the most pixels that it will be used for; see `programs.pixel_chunks`.
        caption_tokens: Length of captions.
        max_batch: Maximum batch size of a step that it will be used for.
        folder: Directory that the file is written to.
        fixed: Whether the graph is only for the size `largest` and the batch `max_batch`, which is exported several
            times as fast.

    Raises:
        ExportError: The export failed, or the graph does not have the structure of the network.
        ConfigError: A package is missing.
        BundleError: The file cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    path = folder / file_name(graph, ".onnx")
    program = describe_program(network, graph, caption_tokens, (largest, max_batch) if fixed else None)
    network.pixel_chunks = chunks = pixel_chunks(network, largest, max_batch)
    try:
        onnx_program = _export_program(program)
    except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportError(f"Exporting the {graph} graph to ONNX failed: {error}") from error
    finally:
        network.pixel_chunks = None
    _name_operators(onnx_program)
    with writing(path), _quiet():
        onnx_program.save(path, external_data=True)
    exported = ExportedGraph(graph, path, _count_operators(path))
    _check_structure(exported, network, program, chunks)
    return exported


def _export_program(program: Program) -> torch.onnx.ONNXProgram:
    with _quiet():
        exported = torch.export.export(
            program.module, program.inputs, dynamic_shapes=program.dynamic_shapes, strict=False
        )
        onnx_program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=True,
            custom_translation_table=_translations(),
            input_names=list(program.input_names),
            output_names=list(program.output_names),
            verbose=False,
        )
    assert onnx_program is not None  # noqa: S101  for mypy: it is None only if torch writes the file itself
    return onnx_program


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translate the custom operators of quantised layers to ONNX."""
    import ml_dtypes
    import numpy as np

    script: Any = require("onnxscript")
    ir, op = script.ir, script.opset23
    dynamic_quantize = script.values.Op(script.values.Opset(TRT_DOMAIN, 1), FP4_QUANTIZE, _fp4_quantize_schema())
    zero = ir.tensor(np.zeros((), dtype=ml_dtypes.float8_e4m3fn))  # the zero point's type selects FP8

    def fp8_round(x: Any, scale: Any) -> Any:
        in_dtype = op.CastLike(scale, x)
        return op.DequantizeLinear(op.QuantizeLinear(x, in_dtype, op.Constant(value=zero)), in_dtype)

    def fp8_weight(weight: Any, scale: Any) -> Any:
        return op.DequantizeLinear(weight, scale, axis=0)

    def fp4_round(x: Any, scale: Any) -> Any:
        fp8 = ir.DataType.FLOAT8E4M3FN.value
        rounded, block_scale = dynamic_quantize(x, scale, axis=-1, block_size=BLOCK, scale_type=fp8)
        factors = op.DequantizeLinear(block_scale, op.CastLike(scale, x))
        return op.DequantizeLinear(rounded, factors, axis=-1, block_size=BLOCK)

    def fp4_weight(weight: Any, block_scale: Any, scale: Any) -> Any:
        return op.DequantizeLinear(weight, op.DequantizeLinear(block_scale, scale), axis=-1, block_size=BLOCK)

    operators = torch.ops.pid
    return {
        operators.fp8_round.default: fp8_round,
        operators.fp8_weight.default: fp8_weight,
        operators.fp4_round.default: fp4_round,
        operators.fp4_weight.default: fp4_weight,
    }


def _fp4_quantize_schema() -> Any:
    """Describe the operator by which TensorRT's parser knows the rounding to FP4 with block scales from the input."""
    schemas = require("onnx").defs.OpSchema
    parameter, kinds = schemas.FormalParameter, schemas.AttrType
    return schemas(
        FP4_QUANTIZE,
        TRT_DOMAIN,
        1,
        inputs=[parameter("x", "X"), parameter("scale", "tensor(float)")],
        outputs=[parameter("rounded", "tensor(float4e2m1)"), parameter("block_scale", "tensor(float8e4m3fn)")],
        type_constraints=[("X", [f"tensor({name})" for name in ("float", "float16", "bfloat16")], "")],
        attributes=[schemas.Attribute(name, kinds.INT) for name in ("axis", "block_size", "scale_type")],
    )


def _name_operators(onnx_program: torch.onnx.ONNXProgram) -> None:
    """Name the Attention operators and the products of FP4 layers as the modules of the network; TensorRT keeps them.

    In the pixel blocks, a layer has a product per chunk. The names of all but the first have a number.
    """
    uses: Counter[str] = Counter()
    for node in onnx_program.model.graph:
        *_, scope, _operator = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))
        module = scope.removeprefix("decoder.")
        if node.op_type == "Attention":
            node.name = module.removesuffix(".fp8")
        elif node.op_type in ("MatMul", "Gemm") and Fp4Linear.__qualname__ in node.metadata_props.get(_CLASSES, ""):
            uses[module] += 1
            node.name = module if uses[module] == 1 else f"{module} {uses[module]}"


def _count_operators(path: Path) -> dict[str, int]:
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _check_structure(exported: ExportedGraph, network: FoldedDecoder, program: Program, chunks: int) -> None:
    """Check that a graph has the layers of the network, in operators that TensorRT supports.

    Raises:
        ExportError: A property of the graph differs from the network.
    """
    onnx = require("onnx")
    model = onnx.load(exported.path, load_external_data=False)
    graph, operators = model.graph, exported.operators
    constants = graph.initializer
    step = exported.graph == "step"
    types = onnx.TensorProto
    in_fp8 = quantised_layers(network, Fp8Linear) if step else {}
    in_fp4 = quantised_layers(network, Fp4Linear) if step else {}
    modules = attentions(network) if step else {}
    rounded = [name for name, attention in modules.items() if attention.fp8 is not None]
    # A rounded input is dequantised once; several layers may share it. A weight is dequantised once, or in the pixel
    # blocks up to once per chunk. In FP4, the block scales of inputs and weights are dequantised as well.
    inputs = operators.get("QuantizeLinear", 0) + 2 * operators.get(FP4_QUANTIZE, 0)
    dequantised = operators.get("DequantizeLinear", 0)
    fewest, most = inputs, inputs
    for name in (*in_fp8, *in_fp4):
        operators_per_use = 2 if name in in_fp4 else 1
        fewest += operators_per_use
        most += operators_per_use * (chunks if name.startswith("pixel_blocks.") else 1)
    properties: tuple[tuple[str, Any, Any], ...] = (
        ("inputs", [value.name for value in graph.input], list(program.input_names)),
        ("outputs", [value.name for value in graph.output], list(program.output_names)),
        ("FP8 weights", _count_weights(constants, types.FLOAT8E4M3FN, ".weight"), len(in_fp8)),
        ("FP4 weights", _count_weights(constants, types.FLOAT4E2M1, ".weight"), len(in_fp4)),
        ("FP4 block scales", _count_weights(constants, types.FLOAT8E4M3FN, ".block_scale"), len(in_fp4)),
        ("Attention operators", [node.name for node in graph.node if node.op_type == "Attention"], list(modules)),
        ("attentions in FP8", _attentions_in_fp8(graph), rounded),
        ("DequantizeLinear operators", dequantised, min(max(dequantised, fewest), most)),
        ("sequence operators", [name for name in operators if "Sequence" in name], []),
        ("float64 constants", [t.name for t in constants if t.data_type == types.DOUBLE], []),
    )
    for name, found, expected in properties:
        if found != expected:
            raise ExportError(
                f"The exported {exported.graph} graph does not match the network: {name} should be {expected}, "
                f"found {found}."
            )


def _count_weights(constants: Iterable[Any], data_type: int, suffix: str) -> int:
    return sum(tensor.data_type == data_type and tensor.name.endswith(suffix) for tensor in constants)


def _attentions_in_fp8(graph: Any) -> list[str]:
    """Return the names of the Attention operators whose queries, keys and values all come from DequantizeLinear."""
    producers = {output: node.op_type for node in graph.node for output in node.output}
    return [
        node.name
        for node in graph.node
        if node.op_type == "Attention" and all(producers.get(name) == "DequantizeLinear" for name in node.input[:3])
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about optional packages and deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
