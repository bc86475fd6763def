"""Exports the two graphs to ONNX: torch.export, then opset 23 with FP8 as QuantizeLinear and DequantizeLinear.

The structure of every exported graph is checked against the network.
"""

from __future__ import annotations

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
from torch import nn

from engines.bundle import writing
from engines.errors import ConfigError, PidError
from engines.manifest import Graph
from engines.pid import FoldedDecoder, graphs
from engines.pid.config import PATCH_PIXELS
from engines.pid.fp8 import Fp8Linear
from engines.size import Size

OPSET = 23  # the first with Attention and RMSNormalization, which TensorRT imports as single operators
_MAX_CHUNKS = 4  # of the pixel blocks; each chunk is a copy of their layers in the graph


class ExportError(PidError):
    """The graph could not be exported, or does not have the structure of the network."""

    code = "export-failed"


@dataclass(frozen=True)
class ExportedGraph:
    """An ONNX file and its weights."""

    graph: Graph
    size: Size
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


@dataclass(frozen=True)
class _Program:
    """A module with the arguments of torch.export and the tensor names of torch.onnx.export."""

    module: nn.Module
    inputs: tuple[Any, ...]  # example inputs
    dynamic_shapes: Any
    input_names: list[str]
    output_names: list[str]


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


def file_name(graph: Graph, size: Size, suffix: str) -> str:
    """Return the name of a graph's file in the workspace and in the bundle."""
    return f"{graph}-{size}{suffix}"


def onnx_files(graph: Graph, size: Size) -> tuple[str, str]:
    """Return the names of the files of an exported graph: the graph itself, and its weights."""
    name = file_name(graph, size, ".onnx")
    return name, f"{name}.data"


def export(
    network: FoldedDecoder, graph: Graph, size: Size, caption_tokens: int, max_batch: int, folder: Path
) -> ExportedGraph:
    """Export one graph of a network for one output size.

    Args:
        network: On the CPU; the graph has its dtype.
        graph: A condition graph supports one image, a step graph 1 to `max_batch`.
        size: Output size.
        caption_tokens: Length of captions.
        max_batch: Maximum batch size of a step.
        folder: Directory that the file is written to.

    Raises:
        ExportError: The export failed, or the graph does not have the structure of the network.
        ConfigError: A package is missing.
        BundleError: The file cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    # Make the position tables before tracing, so that the graph contains them as constants and not as operators.
    network.geometry(size, caption_tokens, torch.device("cpu"))
    tokens = size.area // PATCH_PIXELS
    network.pixel_chunk = chunk = max(network.chunk_tokens(max_batch, tokens), -(-tokens // _MAX_CHUNKS))
    path = folder / file_name(graph, size, ".onnx")
    if graph == "condition":
        program = _condition_program(network, size, caption_tokens)
    else:
        program = _step_program(network, size, caption_tokens, max_batch)
    try:
        onnx_program = _export_program(program)
    except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportError(f"Exporting the {graph} graph to ONNX failed: {error}") from error
    finally:
        network.pixel_chunk = None
    with writing(path), _quiet():
        onnx_program.save(path, external_data=True)
    exported = ExportedGraph(graph, size, path, _count_operators(path))
    _check_structure(exported, network, program, chunks=-(-tokens // chunk))
    return exported


def _condition_program(network: FoldedDecoder, size: Size, caption_tokens: int) -> _Program:
    config = network.config
    latent = torch.zeros(1, config.latent_channels, *config.latent_size(size))
    caption = torch.zeros(1, caption_tokens, config.caption_width)
    return _Program(
        graphs.ConditionGraph(network, size),
        inputs=(latent, caption),
        dynamic_shapes=None,
        input_names=[graphs.LATENT, graphs.CAPTION],
        output_names=[graphs.CAPTION_TOKENS, *graphs.token_names(config.token_sets)],
    )


def _step_program(network: FoldedDecoder, size: Size, caption_tokens: int, max_batch: int) -> _Program:
    config, dtype = network.config, network.dtype
    sets, tokens = config.token_sets, size.area // PATCH_PIXELS
    batch = min(2, max_batch)  # torch.export would specialise on an example batch of 1
    inputs = (  # separate tensors: torch.export would treat a repeated one as a single input
        torch.zeros(batch, 3, *size),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.long),
        torch.zeros(batch, 3, *size),
        torch.zeros(batch, caption_tokens, config.hidden_size, dtype=dtype),
        [torch.zeros(batch, tokens, config.hidden_size, dtype=dtype) for _ in range(sets)],
    )
    axis = {0: torch.export.Dim("batch", min=1, max=max_batch)} if max_batch > 1 else None
    names = [graphs.X, graphs.SIGMA, graphs.STEP_INDEX, graphs.NOISE, graphs.CAPTION_TOKENS]
    return _Program(
        graphs.StepGraph(network, size),
        inputs=inputs,
        dynamic_shapes=None if axis is None else (axis, axis, axis, axis, axis, [axis] * sets),
        input_names=[*names, *graphs.token_names(sets)],
        output_names=[graphs.NEXT_X],
    )


def _export_program(program: _Program) -> torch.onnx.ONNXProgram:
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
            input_names=program.input_names,
            output_names=program.output_names,
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


def _count_operators(path: Path) -> dict[str, int]:
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _check_structure(exported: ExportedGraph, network: FoldedDecoder, program: _Program, chunks: int) -> None:
    """Check that a graph has the layers of the network, in operators that TensorRT supports.

    Raises:
        ExportError: A property of the graph differs from the network.
    """
    onnx = require("onnx")
    model = onnx.load(exported.path, load_external_data=False)
    constants, operators = model.graph.initializer, exported.operators
    step = exported.graph == "step"
    fp8_layers = [name for name, module in network.named_modules() if isinstance(module, Fp8Linear) and step]
    fp8_type = onnx.TensorProto.FLOAT8E4M3FN
    weights = sum(len(tensor.dims) == 2 and tensor.data_type == fp8_type for tensor in constants)
    attentions = network.config.patch_depth + network.config.pixel_depth if step else 0
    # Every quantised input is dequantised once; several layers may share it. Every weight is dequantised once, or in
    # the pixel blocks up to once per chunk.
    inputs = operators.get("QuantizeLinear", 0)
    dequantised = operators.get("DequantizeLinear", 0)
    max_uses = sum(chunks if name.startswith("pixel_blocks.") else 1 for name in fp8_layers)
    properties: tuple[tuple[str, Any, Any], ...] = (
        ("inputs", [value.name for value in model.graph.input], program.input_names),
        ("outputs", [value.name for value in model.graph.output], program.output_names),
        ("FP8 weights", weights, len(fp8_layers)),
        ("Attention operators", operators.get("Attention", 0), attentions),
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
