"""Exports the two graphs to ONNX: torch.export, then opset 23 with FP8 as QuantizeLinear and DequantizeLinear.

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
from collections.abc import Callable, Iterator, Mapping
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
from engines.pid.fp8 import Fp8Linear
from engines.pid.graphs import Graph
from engines.size import Size

_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's record of the modules around an operator, and its name
OPSET = 23  # the first with Attention and RMSNormalization, which TensorRT imports as single operators


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
    _name_attentions(onnx_program)
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
    """Translate the two custom FP8 operators to ONNX."""
    import ml_dtypes
    import numpy as np

    script: Any = require("onnxscript")
    ir, op = script.ir, script.opset23
    zero = ir.tensor(np.zeros((), dtype=ml_dtypes.float8_e4m3fn))  # the zero point's type selects FP8

    def fp8_round(x: Any, scale: Any) -> Any:
        in_dtype = op.CastLike(scale, x)
        return op.DequantizeLinear(op.QuantizeLinear(x, in_dtype, op.Constant(value=zero)), in_dtype)

    def fp8_weight(weight: Any, scale: Any) -> Any:
        return op.DequantizeLinear(weight, scale, axis=0)

    return {torch.ops.pid.fp8_round.default: fp8_round, torch.ops.pid.fp8_weight.default: fp8_weight}


def _name_attentions(onnx_program: torch.onnx.ONNXProgram) -> None:
    """Name the Attention operators as the modules of the network; TensorRT keeps the names."""
    for node in onnx_program.model.graph:
        if node.op_type == "Attention":
            *_, scope, _operator = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))
            node.name = scope.removeprefix("decoder.").removesuffix(".fp8")


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
    fp8_layers = [name for name, module in network.named_modules() if isinstance(module, Fp8Linear) and step]
    fp8_type = onnx.TensorProto.FLOAT8E4M3FN
    weights = sum(len(tensor.dims) == 2 and tensor.data_type == fp8_type for tensor in constants)
    modules = attentions(network) if step else {}
    rounded = [name for name, attention in modules.items() if attention.fp8 is not None]
    # Every quantised input is dequantised once; several layers may share it. Every weight is dequantised once, or in
    # the pixel blocks up to once per chunk.
    inputs = operators.get("QuantizeLinear", 0)
    dequantised = operators.get("DequantizeLinear", 0)
    max_uses = sum(chunks if name.startswith("pixel_blocks.") else 1 for name in fp8_layers)
    properties: tuple[tuple[str, Any, Any], ...] = (
        ("inputs", [value.name for value in graph.input], list(program.input_names)),
        ("outputs", [value.name for value in graph.output], list(program.output_names)),
        ("FP8 weights", weights, len(fp8_layers)),
        ("Attention operators", [node.name for node in graph.node if node.op_type == "Attention"], list(modules)),
        ("attentions in FP8", _attentions_in_fp8(graph), rounded),
        ("DequantizeLinear operators", dequantised, min(max(dequantised, weights + inputs), max_uses + inputs)),
        ("sequence operators", [name for name in operators if "Sequence" in name], []),
        ("float64 constants", [t.name for t in constants if t.data_type == onnx.TensorProto.DOUBLE], []),
    )
    for name, found, expected in properties:
        if found != expected:
            raise ExportError(
                f"The exported {exported.graph} graph does not match the network: {name} should be {expected}, "
                f"found {found}."
            )


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
