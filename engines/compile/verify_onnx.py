"""The exported graphs on the CPU: ONNX Runtime must compute what PyTorch does, step by step and to the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from engines.compile.export import ExportedGraph, export, require
from engines.compile.quantise import rule_of, share, with_fp8
from engines.compile.results import CheckResult
from engines.errors import PidError
from engines.manifest import Graph
from engines.pid import FoldedDecoder, graphs
from engines.pid.config import PidConfig
from engines.pid.sampler import MAX_STEPS, STEP_TRANSITIONS, step_indices
from engines.size import Size

# onnxruntime has no bfloat16 on the CPU, so the same export is checked in the dtypes on either side of it.
FORMS = {"float32": torch.float32, "float16": torch.float16}
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}  # of the velocity, relative, whatever is in FP8
_ROUNDING = 2e-6  # what float32 makes of sums in another order, which no layer can be held below
# With FP8 also parts of the quantisation's error. The last bit of a sum can decide to which side a value is rounded,
# and one such flip deviates the inputs of all later layers, so the difference grows with the number of FP8 layers in a
# row: the whole network is held to what quantisation costs anyhow, each kind of layer by itself to a tenth of it.
FP8_TOLERANCE, FP8_KIND_TOLERANCE = 1.0, 0.1
_BATCH = 2
_CAPTION_TOKENS = 8

State = tuple[Tensor, list[Tensor]]  # caption tokens and adapter tokens


class GraphError(PidError):
    """The exported graph does not compute what the network does."""

    code = "graph-differs"


class Decoding(Protocol):
    """Whatever computes the two graphs, see `engines.pid.graphs`; the condition one image at a time."""

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]: ...

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Inputs:
    """Of a decode of B images."""

    latent: Tensor  # [B, c, h, w]
    caption: Tensor  # [B, T, E]
    sigma: Tensor  # [B]
    noise: Tensor  # [1 + steps, B, 3, H, W]


def _sizes(config: PidConfig) -> tuple[Size, int]:
    """A small output that is not square, and few caption tokens: the graphs differ between sizes in tables alone."""
    size = Size(config.cell_side * max(1, 32 // config.cell_side), config.cell_side * max(2, 64 // config.cell_side))
    return size, min(_CAPTION_TOKENS, config.caption_tokens)


def check(
    network: FoldedDecoder, quantisation_error: float | None, folder: Path, progress: Callable[[str], None]
) -> tuple[CheckResult, ...]:
    """Export at a small size, run by ONNX Runtime, compare; in float32 and in float16.

    quantisation_error is that of the FP8 layers (relative, of the velocity), None where there are none. Raises
    GraphError beyond the tolerance.
    """
    results = []
    for form, dtype in FORMS.items():
        progress(f"{form} against PyTorch")
        limit = max(TOLERANCE[form], FP8_TOLERANCE * (quantisation_error or 0.0))
        results.append(_compare_runtimes(share(network, dtype), form, limit, folder, get_args(Graph)))
    return tuple(results)


def check_kinds(
    network: FoldedDecoder, largest_inputs: Mapping[str, float], folder: Path, progress: Callable[[str], None]
) -> tuple[CheckResult, ...]:
    """The same in float32 for each kind of FP8 layer by itself, in the unquantised network's first and last block.

    Raises GraphError where one differs by more than a tenth of what its quantisation costs.
    """
    small, names = shallow(network)
    largest = {new: largest_inputs[old] for new, old in names.items() if old in largest_inputs}
    results = []
    for pattern in dict.fromkeys(rule_of(layer).pattern for layer in largest):
        progress(f"{pattern} in FP8 against PyTorch")
        kind = with_fp8(small, {layer: value for layer, value in largest.items() if rule_of(layer).pattern == pattern})
        size, tokens = _sizes(small.config)
        inputs = random_inputs(small.config, size, tokens)
        cost, _ = compare(_Torch(small, size), _Torch(kind, size), inputs)
        limit = max(_ROUNDING, FP8_KIND_TOLERANCE * sum(cost) / len(cost))
        results.append(_compare_runtimes(kind, pattern, limit, folder, ("step",)))
    return tuple(results)


def shallow(network: FoldedDecoder) -> tuple[FoldedDecoder, dict[str, str]]:
    """The network with its first and last patch block alone, and the names its layers had in the whole one."""
    depth = network.config.patch_depth
    blocks = (0, depth - 1) if depth > 1 else (0,)
    config = replace(network.config, patch_depth=len(blocks), injection_interval=len(blocks))
    with torch.device("meta"):
        small = FoldedDecoder(config, network.timesteps)

    def original(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "patch_blocks" and len(parts) > 1:
            parts[1] = str(blocks[int(parts[1])])
        return ".".join(parts)

    state = network.state_dict()
    taken = {name: state[original(name)] for name in small.state_dict()}
    taken["modulation_table"] = state["modulation_table"][:, list(blocks)]
    small.load_state_dict(taken, strict=True, assign=True)
    names = {name: original(name) for name, _ in small.named_modules()}
    return small.eval().requires_grad_(False), names


def _compare_runtimes(
    network: FoldedDecoder, what: str, limit: float, folder: Path, kinds: Sequence[Graph]
) -> CheckResult:
    """Of `kinds` that lack the condition, ONNX Runtime's steps take PyTorch's."""
    size, tokens = _sizes(network.config)
    exports = [export(network, graph, size, tokens, _BATCH, folder) for graph in kinds]
    try:
        ours = _Torch(network, size)
        theirs = _Onnx(exports, ours)
    finally:
        for file in (file for exported in exports for file in exported.files):
            file.unlink()
    errors, psnr = compare(ours, theirs, random_inputs(network.config, size, tokens))
    if not max(errors) <= limit:
        raise GraphError(
            f"ONNX Runtime and PyTorch differ by {max(errors):.1e} in the velocity ({what}); the limit is {limit:.1e}."
        )
    return CheckResult(what=what, velocity_error=errors, image_psnr=psnr, tolerance=limit)


def random_inputs(config: PidConfig, size: Size, tokens: int) -> Inputs:
    """On the CPU, two images, the second of a noisy latent."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        normal(_BATCH, config.latent_channels, *config.latent_size(size)),
        normal(_BATCH, tokens, config.caption_width),
        torch.tensor([0.0, 0.5]),
        normal(MAX_STEPS + 1, _BATCH, 3, *size),
    )


class _Torch:
    def __init__(self, network: FoldedDecoder, size: Size) -> None:
        self._condition, self._step = graphs.ConditionGraph(network, size), graphs.StepGraph(network, size)

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        return list(self._condition(latent, caption))

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        result: Tensor = self._step(x, sigma, index, noise, tokens[0], tokens[1:])
        return result


class _Onnx:
    def __init__(self, exports: list[ExportedGraph], ours: _Torch) -> None:
        self._runs = {exported.graph: _session(exported.path) for exported in exports}
        self._ours = ours

    def condition(self, latent: Tensor, caption: Tensor) -> list[Tensor]:
        if "condition" not in self._runs:
            return self._ours.condition(latent, caption)
        return self._runs["condition"]({graphs.LATENT: latent, graphs.CAPTION: caption})

    def step(self, x: Tensor, sigma: Tensor, index: Tensor, noise: Tensor, tokens: list[Tensor]) -> Tensor:
        names = (graphs.CAPTION_TOKENS, *graphs.token_names(len(tokens) - 1))
        state = dict(zip(names, tokens, strict=True))
        inputs = {graphs.X: x, graphs.SIGMA: sigma, graphs.STEP_INDEX: index, graphs.NOISE: noise, **state}
        return self._runs["step"](inputs)[0]


def _session(path: Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Beyond it, products in FP8 are fused into an operator that has no FP8.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@torch.inference_mode()
def compare(ours: Decoding, theirs: Decoding, inputs: Inputs) -> tuple[tuple[float, ...], float]:
    """The largest relative velocity error of each step, from equal inputs; and the PSNR of the two pictures in dB."""
    tokens, other_tokens = (_conditions(runtime, inputs) for runtime in (ours, theirs))
    x = alone = inputs.noise[0]
    errors = []
    for position, row in enumerate(step_indices(MAX_STEPS)):
        t, next_t = STEP_TRANSITIONS[row]
        index, noise = torch.full((len(x),), row, device=x.device), inputs.noise[position + 1]
        expected = ours.step(x, inputs.sigma, index, noise, tokens)
        actual = theirs.step(x, inputs.sigma, index, noise, other_tokens)
        velocity = velocity_of_step(x, expected, noise, t, next_t)
        difference = velocity_of_step(x, actual, noise, t, next_t) - velocity
        errors.append((difference.flatten(1).norm(dim=1) / velocity.flatten(1).norm(dim=1)).max().item())
        alone = theirs.step(alone, inputs.sigma, index, noise, other_tokens)
        x = expected
    return tuple(errors), psnr(x.clamp(-1, 1), alone.clamp(-1, 1))


def velocity_of_step(x: Tensor, next_x: Tensor, noise: Tensor, t: float, next_t: float) -> Tensor:
    """The velocity that took x to next_x: `sampler.advance` the other way."""
    x0 = (next_x - next_t * noise) / (1 - next_t)
    return (x - x0) / t


def _conditions(runtime: Decoding, inputs: Inputs) -> list[Tensor]:
    """The condition graph takes one image at a time."""
    each = [runtime.condition(inputs.latent[i : i + 1], inputs.caption[i : i + 1]) for i in range(len(inputs.latent))]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of two pictures in [-1, 1]; 99 at most, which stands for equal."""
    error = (a.float() - b.float()).square().mean().item()
    return min(99.0, -10 * float(np.log10(max(error / 4, 1e-30))))
