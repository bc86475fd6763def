"""Describes the two graphs for export: modules, example inputs, and the dimensions that vary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from engines.manifest import MAX_BATCH
from engines.pid import FoldedDecoder, graphs
from engines.pid.config import PATCH, PATCH_PIXELS, PidConfig
from engines.pid.graphs import Graph, tensor_specs
from engines.size import MAX_SIDE, Size

_MAX_CHUNKS = 4  # of the pixel blocks; each chunk is a copy of their layers in the graph
_EXAMPLE_CELLS, _EXAMPLE_BATCH = (2, 3), 2  # torch.export would specialise on an example dimension of 1


@dataclass(frozen=True)
class Program:
    """A module with the arguments of torch.export, and the names of its tensors."""

    module: nn.Module
    inputs: tuple[Any, ...]  # example inputs
    dynamic_shapes: tuple[Any, ...]
    input_names: tuple[str, ...]  # in the order of the flattened inputs
    output_names: tuple[str, ...]


def describe_program(
    network: FoldedDecoder, graph: Graph, caption_tokens: int, fixed: tuple[Size, int] | None = None
) -> Program:
    """Describe a graph of a network with dynamic height, width and batch.

    Args:
        network: On the CPU; the graph has its dtype.
        graph: A condition graph supports one image, a step graph 1 to `MAX_BATCH`.
        caption_tokens: Length of captions, which is fixed.
        fixed: The only output size and batch of the graph, instead of dynamic ones.
    """
    config = network.config
    size, batch = fixed or (Size(*(cells * config.cell_side for cells in _EXAMPLE_CELLS)), _EXAMPLE_BATCH)
    specs = tensor_specs(graph, config, network.dtype, size, caption_tokens, batch)
    # Separate tensors: torch.export would treat a repeated one as a single input.
    example = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items() if spec.input}
    axes = dict.fromkeys(example) if fixed else _dynamic_axes(graph, config)
    names = tuple(example)
    outputs = tuple(name for name, spec in specs.items() if not spec.input)
    if graph == "condition":
        condition_inputs, shapes = tuple(example.values()), tuple(axes[name] for name in names)
        return Program(graphs.ConditionGraph(network), condition_inputs, shapes, names, outputs)

    def nested(values: dict[str, Any]) -> tuple[Any, ...]:
        first = (graphs.X, graphs.SIGMA, graphs.STEP_INDEX, graphs.NOISE, graphs.CAPTION_TOKENS)
        tokens = [values[name] for name in graphs.token_names(config.token_sets)]
        return (*(values[name] for name in first), tokens, [values[name] for name in graphs.TABLES])

    return Program(graphs.StepGraph(network, caption_tokens), nested(example), nested(axes), names, outputs)


def _dynamic_axes(graph: Graph, config: PidConfig) -> dict[str, dict[int, Any] | None]:
    """Return input name -> axis -> dimension, for the axes that vary. All depend on the latent's height and width."""
    most = MAX_SIDE // config.cell_side
    batch, h, w = Dim("batch", min=1, max=MAX_BATCH), Dim("h", min=1, max=most), Dim("w", min=1, max=most)
    if graph == "condition":
        return {graphs.LATENT: {2: h, 3: w}, graphs.CAPTION: {}}
    tokens_per_cell = config.cell_side // PATCH
    rows, columns = _times(tokens_per_cell, h), _times(tokens_per_cell, w)
    height, width = config.cell_side * h, config.cell_side * w
    image = {0: batch, 2: height, 3: width}
    return {
        graphs.X: image,
        graphs.SIGMA: {0: batch},
        graphs.STEP_INDEX: {0: batch},
        graphs.NOISE: image,
        graphs.CAPTION_TOKENS: {0: batch},
        **{name: {0: batch, 1: rows, 2: columns} for name in graphs.token_names(config.token_sets)},
        **{name: {0: rows, 1: columns} for name in graphs.ROTARY_TABLES},
        graphs.ROW_POSITIONS: {0: height},
        graphs.COLUMN_POSITIONS: {0: width},
    }


def _times(factor: int, dimension: Any) -> Any:
    return dimension if factor == 1 else factor * dimension  # torch.export rejects a factor of 1


def pixel_chunks(network: FoldedDecoder, largest: Size, max_batch: int) -> int:
    """Return how many chunks the pixel blocks of an exported graph run in.

    Their number must divide the number of tokens of every size. A latent cell covers u² tokens, so the divisors of u²
    do. The smallest one that keeps images of the `largest` size within the memory budget is chosen, or else the
    largest one.
    """
    tokens = largest.area // PATCH_PIXELS
    needed = -(-tokens // network.chunk_tokens(max_batch, tokens))
    per_cell = (network.config.cell_side // PATCH) ** 2
    counts = [count for count in range(1, _MAX_CHUNKS + 1) if per_cell % count == 0]
    return next((count for count in counts if count >= needed), counts[-1])
