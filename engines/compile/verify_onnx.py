"""Verifies exported graphs on the CPU: ONNX Runtime must compute what PyTorch does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engines.accuracy import largest
from engines.compile.comparison import NonFiniteReferenceError, TorchGraphs, compare, random_decode_inputs
from engines.compile.export import ExportedGraph, export, require
from engines.compile.inputs.calibrate import Ranges
from engines.compile.onnx_fp4 import without_fp4
from engines.compile.planning.layer_rules import rule_for
from engines.compile.results import CheckResult
from engines.compile.variants import as_exported, first_and_last_block, shallow_copy, with_quantised
from engines.errors import PidError
from engines.manifest import Quantised
from engines.pid import FoldedDecoder, graphs
from engines.pid.config import PidConfig
from engines.pid.fp4 import Fp4Linear
from engines.pid.graphs import GRAPHS, Graph
from engines.pid.quantised import KINDS
from engines.pid.sampler import MAX_STEPS
from engines.size import Size

# ONNX Runtime has no bfloat16 on the CPU, so the network is verified with more and with fewer bits of mantissa.
DTYPES = {"float32": torch.float32, "float16": torch.float16}
TOLERANCE = {"float32": 1e-5, "float16": 1e-2}  # relative velocity error, without quantisation
_ROUNDING = 2e-6  # velocity error that another order of float32 sums causes; no limit is lower
# The last bit of a sum can decide to which of two FP8 or FP4 values a number is rounded. One such flip changes the
# inputs of all later layers, so the difference grows with the number of consecutive quantised layers. The limits are
# therefore multiples of the error of quantisation itself: of the whole network, where two independent errors would
# differ by √2, and of one kind of layer.
QUANTISED_TOLERANCE, KIND_TOLERANCE = 1.5, 0.1
_CAPTION_TOKENS = 8

Value = TypeVar("Value")


class GraphError(PidError):
    """The exported graph does not compute what the network does."""

    code = "graph-differs"


def verify_graphs(
    network: FoldedDecoder, quantisation_error: float | None, folder: Path, progress: Callable[[str], None]
) -> tuple[CheckResult, ...]:
    """Export both graphs and compare ONNX Runtime with PyTorch at small sizes, in float32 and in float16.

    A network that overflows in float16 is compared in float32 only.

    Args:
        network: The network, on the CPU.
        quantisation_error: Relative velocity error of quantisation; None for a network without quantised layers.
        folder: Directory for temporary files.
        progress: Called with a description of each comparison.

    Raises:
        GraphError: The difference exceeds the tolerance.
        VerificationError: An implementation produces infinity or NaN.
        ExportError: A graph cannot be exported.
    """
    results, sizes = [], _small_sizes(network.config)
    for name, dtype in DTYPES.items():
        progress(f"{name} against PyTorch")
        limit = max(TOLERANCE[name], QUANTISED_TOLERANCE * (quantisation_error or 0.0))
        try:
            results.append(_verify(shallow_copy(network, dtype), name, limit, folder, GRAPHS, sizes))
        except NonFiniteReferenceError:
            if dtype == torch.float32:
                raise
            progress(f"skipped in {name}, in which the network overflows")  # bf16, which may be built, has more range
    return tuple(results)


def verify_layer_kinds(
    network: FoldedDecoder,
    ranges: Ranges,
    precisions: Sequence[Quantised],
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[CheckResult, ...]:
    """Compare ONNX Runtime with PyTorch for each kind of quantised layer and attention separately, in float32.

    Only the first and the last patch block are used. The limit is a tenth of the error that quantising causes.

    Args:
        network: The network before quantisation, on the CPU.
        ranges: Ranges of the layers and attentions to quantise.
        precisions: Precisions of the layers.
        folder: Directory for temporary files.
        progress: Called with a description of each comparison.

    Raises:
        GraphError: The difference exceeds the limit.
        VerificationError: An implementation produces infinity or NaN.
        ExportError: A graph cannot be exported.
    """
    small, names = first_and_last_block(network)
    inputs_of = {new: ranges.inputs[old] for new, old in names.items() if old in ranges.inputs}
    attentions = {new: ranges.attentions[old] for new, old in names.items() if old in ranges.attentions}
    size, tokens = _small_sizes(small.config)[0], _caption_tokens(small.config)
    inputs = random_decode_inputs(small.config, size, tokens)
    results = []
    for precision, pattern in _kinds(small, inputs_of, attentions, precisions):
        name = f"{pattern} in {precision.upper()}"
        progress(f"{name} against PyTorch")
        kind = with_quantised(small, _matching(inputs_of, pattern), _matching(attentions, pattern), KINDS[precision])
        in_torch = TorchGraphs(as_exported(kind), tokens)
        found = compare(TorchGraphs(small, tokens), in_torch, inputs, f"PyTorch with {name}")
        quantisation_error = found.velocity_error
        limit = max(_ROUNDING, KIND_TOLERANCE * sum(quantisation_error) / len(quantisation_error))
        results.append(_verify(kind, name, limit, folder, ("step",), (size,)))
    return tuple(results)


def _kinds(
    network: FoldedDecoder, layers: Iterable[str], attentions: Iterable[str], precisions: Sequence[Quantised]
) -> list[tuple[Quantised, str]]:
    """Return the precisions and the patterns of the rules of layers, and of attentions in FP8, each pair once."""
    in_fp4 = [name for name in layers if Fp4Linear.supports(network.get_submodule(name))]
    names: dict[Quantised, Iterable[str]] = {"fp8": (*layers, *attentions), "fp4": in_fp4}
    pairs = [(precision, rule_for(name).pattern) for precision in precisions for name in names[precision]]
    return list(dict.fromkeys(pairs))


def _matching(values: Mapping[str, Value], pattern: str) -> dict[str, Value]:
    """Select the entries whose names have the rule with this pattern."""
    return {name: value for name, value in values.items() if rule_for(name).pattern == pattern}


def _small_sizes(config: PidConfig) -> tuple[Size, ...]:
    """Return output sizes: wide, square, tall, and very wide. Small ones suffice, because all sizes share a graph."""
    side = config.cell_side * max(1, 32 // config.cell_side)
    return Size(side, 2 * side), Size(side, side), Size(2 * side, side), Size(side, 3 * side)


def _caption_tokens(config: PidConfig) -> int:
    return min(_CAPTION_TOKENS, config.caption_tokens)


def _verify(
    network: FoldedDecoder, name: str, limit: float, folder: Path, kinds: Sequence[Graph], sizes: Sequence[Size]
) -> CheckResult:
    """Compare the exported `kinds` with PyTorch, which also runs the condition graph if it is not among them.

    The first size is compared in all steps, the others in two; batches of 2 alternate with single images.
    """
    tokens, fixed = _caption_tokens(network.config), len(sizes) == 1
    exports = [export(network, graph, sizes[0], tokens, 2, folder, fixed) for graph in kinds]
    try:
        reference = TorchGraphs(as_exported(network), tokens)
        exported = OnnxGraphs(exports, network, fallback=reference)
    finally:
        for file in (file for exported_graph in exports for file in exported_graph.files):
            file.unlink()
    found = []
    for index, size in enumerate(sizes):
        inputs = random_decode_inputs(network.config, size, tokens, batch=2 - index % 2)
        steps = 2 if index else MAX_STEPS
        found.append(compare(reference, exported, inputs, f"ONNX Runtime ({name}, {size})", steps))
        worst = largest(found[-1].velocity_error)
        if not worst <= limit:
            raise GraphError(
                f"ONNX Runtime and PyTorch differ by {worst:.1e} in velocity ({name}, {size}); "
                f"the limit is {limit:.1e}."
            )
    return CheckResult(
        what=name,
        sizes=tuple(sizes),
        velocity_error=tuple(largest(result.velocity_error) for result in found),
        image_psnr=min(result.image_psnr for result in found),
        tolerance=limit,
    )


class OnnxGraphs:
    """Exported graphs, executed by ONNX Runtime."""

    def __init__(self, exports: Sequence[ExportedGraph], network: FoldedDecoder, fallback: TorchGraphs) -> None:
        """Load the graphs of a network; `fallback` runs the condition graph if `exports` does not contain it."""
        self._network = network
        self._sessions = {exported.graph: _open_session(exported.path) for exported in exports}
        self._fallback = fallback

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        """Return caption tokens and adapter tokens for one image."""
        if "condition" not in self._sessions:
            return self._fallback.condition(latent, caption)
        return _run(self._sessions["condition"], {graphs.LATENT: latent, graphs.CAPTION: caption})

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        """Return the next x."""
        names = (graphs.CAPTION_TOKENS, *graphs.token_names(len(tokens) - 1))
        conditioning = dict(zip(names, tokens, strict=True))
        inputs = {graphs.X: x, graphs.SIGMA: sigma, graphs.STEP_INDEX: index, graphs.NOISE: noise, **conditioning}
        tables = self._network.geometry(Size(*x.shape[2:]), x.device)._asdict()
        return _run(self._sessions["step"], {**inputs, **tables})[0]


def _open_session(path: Path) -> Any:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Higher levels fuse FP8 products into an operator that does not support FP8.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(path.parent))
    graph = without_fp4(path)
    values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in graph.weights.values()]
    options.add_external_initializers(list(graph.weights), values)
    return runtime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]
