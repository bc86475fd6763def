"""The two graphs as ONNX: torch.export, then opset 23 with FP8 as QuantizeLinear and DequantizeLinear; then checked."""

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

from engines.errors import ConfigError, PidError
from engines.manifest import Graph
from engines.pid import FoldedDecoder, graphs
from engines.pid.config import PATCH_PIXELS
from engines.pid.fp8 import Fp8Linear
from engines.size import Size

OPSET = 23  # the first with Attention and RMSNormalization, which TensorRT takes whole
_CHUNKS = 4  # of the pixel blocks at most: each is a copy of their layers in the graph


class ExportError(PidError):
    """A graph that could not be exported, or that is not what the network is."""

    code = "export-failed"


@dataclass(frozen=True)
class ExportedGraph:
    graph: Graph
    size: Size
    path: Path  # the .onnx file; its weights lie beside it in <name>.data
    operators: Mapping[str, int]  # how many of each

    @property
    def files(self) -> tuple[Path, Path]:
        return self.path, self.path.with_name(f"{self.path.name}.data")

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def require(package: str) -> ModuleType:
    """Import what only the builder needs. Raises ConfigError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"Compiling engines needs the Python package {package}: pip install 'pid-decode-server[engines]'."
        ) from error


def file_name(graph: Graph, size: Size, suffix: str) -> str:
    return f"{graph}-{size}{suffix}"


def export(
    network: FoldedDecoder, graph: Graph, size: Size, caption_tokens: int, max_batch: int, folder: Path
) -> ExportedGraph:
    """Write one graph of `network` (on the CPU, in the dtype it has) for one output size.

    A step takes 1 to `max_batch` images, a condition one. Raises ExportError, with what the structure check found.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    network.geometry(size, caption_tokens, torch.device("cpu"))  # made before tracing: tables, not operators
    tokens = size[0] * size[1] // PATCH_PIXELS
    network.pixel_chunk = chunk = max(network.chunk_tokens(max_batch), -(-tokens // _CHUNKS))
    path = folder / file_name(graph, size, ".onnx")
    module, inputs, dynamic, names = _describe(network, graph, size, caption_tokens, max_batch)
    try:
        with _quiet():
            exported = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                custom_translation_table=_translations(),
                input_names=names[0],
                output_names=names[1],
                verbose=False,
            )
        assert program is not None  # noqa: S101  it is None only for exports straight to a file
        program.save(path, external_data=True)
    except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportError(f"The {graph} graph could not be exported to ONNX: {error}") from error
    finally:
        network.pixel_chunk = None
    made = ExportedGraph(graph, size, path, _operators(path))
    _check_structure(made, network, names, chunks=-(-tokens // chunk))
    return made


def _describe(
    network: FoldedDecoder, graph: Graph, size: Size, caption_tokens: int, max_batch: int
) -> tuple[nn.Module, tuple[Any, ...], Any, tuple[list[str], list[str]]]:
    """The module, example inputs, which axes are dynamic, and the names of inputs and outputs."""
    config, dtype = network.config, network.dtype
    sets = config.token_sets
    names = list(graphs.token_names(sets))
    if graph == "condition":
        latent = torch.zeros(1, config.latent_channels, *config.latent_size(size))
        caption = torch.zeros(1, caption_tokens, config.caption_width)
        io = ([graphs.LATENT, graphs.CAPTION], [graphs.CAPTION_TOKENS, *names])
        return graphs.ConditionGraph(network, size), (latent, caption), None, io
    # An example batch of 1 would be taken for a constant, and a tensor that is given twice for one input.
    batch = min(2, max_batch)
    tokens = size[0] * size[1] // PATCH_PIXELS
    inputs = (
        torch.zeros(batch, 3, *size),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.long),
        torch.zeros(batch, 3, *size),
        torch.zeros(batch, caption_tokens, config.hidden_size, dtype=dtype),
        [torch.zeros(batch, tokens, config.hidden_size, dtype=dtype) for _ in range(sets)],
    )
    axis = {0: torch.export.Dim("batch", min=1, max=max_batch)} if max_batch > 1 else None
    dynamic = None if axis is None else (axis, axis, axis, axis, axis, [axis] * sets)
    io = ([graphs.X, graphs.SIGMA, graphs.STEP_INDEX, graphs.NOISE, graphs.CAPTION_TOKENS, *names], [graphs.NEXT_X])
    return graphs.StepGraph(network, size), inputs, dynamic, io


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our two operators in ONNX's own."""
    import ml_dtypes
    import numpy as np

    script: Any = require("onnxscript")
    ir, op = script.ir, script.opset23
    zero = ir.tensor(np.zeros((), dtype=ml_dtypes.float8_e4m3fn))  # its type is what says FP8

    def fp8_round(x: Any, scale: Any) -> Any:
        in_dtype = op.CastLike(scale, x)
        return op.DequantizeLinear(op.QuantizeLinear(x, in_dtype, op.Constant(value=zero)), in_dtype)

    def fp8_weight(weight: Any, scale: Any) -> Any:
        return op.DequantizeLinear(weight, scale, axis=0)

    return {torch.ops.pid.fp8_round.default: fp8_round, torch.ops.pid.fp8_weight.default: fp8_weight}


def _operators(path: Path) -> dict[str, int]:
    onnx = require("onnx")
    model = onnx.load(path, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _check_structure(
    made: ExportedGraph, network: FoldedDecoder, names: tuple[list[str], list[str]], chunks: int
) -> None:
    """Raise ExportError unless the graph has the layers that the network has, in forms that TensorRT takes."""
    onnx = require("onnx")
    model = onnx.load(made.path, load_external_data=False)
    step = made.graph == "step"
    fp8_layers = [name for name, module in network.named_modules() if isinstance(module, Fp8Linear) and step]
    fp8_type = onnx.TensorProto.FLOAT8E4M3FN
    weights = sum(len(tensor.dims) == 2 and tensor.data_type == fp8_type for tensor in model.graph.initializer)
    attentions = network.config.patch_depth + network.config.pixel_depth if step else 0
    rounded = made.operators.get("QuantizeLinear", 0)  # layers with one input share its rounding
    # Every rounded input is dequantised once, and every weight once or, in the pixel blocks, once a chunk.
    dequantised = made.operators.get("DequantizeLinear", 0)
    uses = sum(chunks if name.startswith("pixel_blocks.") else 1 for name in fp8_layers)
    found: tuple[tuple[str, Any, Any], ...] = (
        ("inputs", [value.name for value in model.graph.input], names[0]),
        ("outputs", [value.name for value in model.graph.output], names[1]),
        ("FP8 weights", weights, len(fp8_layers)),
        ("Attention operators", made.operators.get("Attention", 0), attentions),
        ("DequantizeLinear operators", dequantised, min(max(dequantised, weights + rounded), uses + rounded)),
        ("operators on sequences", [name for name in made.operators if "Sequence" in name], []),
        ("float64 values", [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.DOUBLE], []),
    )
    for what, actual, expected in found:
        if actual != expected:
            raise ExportError(
                f"The exported {made.graph} graph is not the network: it has {what} {actual}, not {expected}."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on what it could have used, or will one day call otherwise."""
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
