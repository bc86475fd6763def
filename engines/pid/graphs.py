"""The two graphs of a decode. PyTorch executes them as they are; for TensorRT they are exported and compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from engines.pid.config import PATCH, PidConfig
from engines.pid.fold import FoldedDecoder
from engines.pid.network import Conditioning
from engines.pid.positions import Geometry, caption_rotary
from engines.pid.sampler import STEP_TRANSITIONS, advance
from engines.size import Size

Graph = Literal["condition", "step"]
GRAPHS: tuple[Graph, ...] = get_args(Graph)

# Names of the inputs and outputs. Adapter tokens are numbered by injection; those of the pixel blocks come last.
LATENT, CAPTION = "latent", "caption"
X, SIGMA, STEP_INDEX, NOISE, CAPTION_TOKENS = "x", "sigma", "step_index", "noise", "caption_tokens"
TABLES = Geometry._fields
*ROTARY_TABLES, ROW_POSITIONS, COLUMN_POSITIONS = TABLES
NEXT_X = "next_x"


def token_names(count: int) -> tuple[str, ...]:
    """Return the tensor names of `count` sets of adapter tokens."""
    return tuple(f"tokens_{i}" for i in range(count))


@dataclass(frozen=True)
class TensorSpec:
    """Input or output of a graph; a dimension of -1 varies."""

    input: bool
    dtype: torch.dtype | None  # None: not supported by PyTorch
    shape: tuple[int, ...]


def tensor_specs(
    graph: Graph, config: PidConfig, dtype: torch.dtype, size: Size, caption_tokens: int, batch: int
) -> dict[str, TensorSpec]:
    """Return the inputs, then the outputs, of a graph for one output size.

    Args:
        graph: The graph.
        config: The network.
        dtype: Dtype of the network.
        size: Output size.
        caption_tokens: Length of captions.
        batch: Images per step. A condition graph always has a batch of 1.
    """
    rows, columns, width = size.height // PATCH, size.width // PATCH, config.hidden_size
    condition = graph == "condition"
    batch = 1 if condition else batch
    shared = {  # outputs of the condition graph, inputs of the step graph
        CAPTION_TOKENS: TensorSpec(not condition, dtype, (batch, caption_tokens, width)),
        **dict.fromkeys(
            token_names(config.token_sets), TensorSpec(not condition, dtype, (batch, rows, columns, width))
        ),
    }

    def float_input(*shape: int) -> TensorSpec:
        return TensorSpec(True, torch.float32, shape)

    if condition:
        return {
            LATENT: float_input(batch, config.latent_channels, *config.latent_size(size)),
            CAPTION: float_input(batch, caption_tokens, config.caption_width),
            **shared,
        }
    head, pixel_head, half = config.head_width // 2, config.pixel_head_width // 2, config.pixel_channels // 2
    tables = (
        *[(rows, columns, head)] * 2,
        *[(rows, columns, pixel_head)] * 2,
        (size.height, half),
        (size.width, half),
    )
    return {
        X: float_input(batch, 3, *size),
        SIGMA: float_input(batch),
        STEP_INDEX: TensorSpec(True, torch.int64, (batch,)),
        NOISE: float_input(batch, 3, *size),
        **shared,
        **{name: float_input(*shape) for name, shape in zip(TABLES, tables, strict=True)},
        NEXT_X: TensorSpec(False, torch.float32, (batch, 3, *size)),
    }


def varying_specs(graph: Graph, config: PidConfig, dtype: torch.dtype, caption_tokens: int) -> dict[str, TensorSpec]:
    """Return the inputs and outputs of a graph for any output size and batch: dimensions that depend on them are -1."""
    cell = config.cell_side
    small = tensor_specs(graph, config, dtype, Size(cell, cell), caption_tokens, 1)
    large = tensor_specs(graph, config, dtype, Size(2 * cell, 2 * cell), caption_tokens, 2)

    def combine(a: TensorSpec, b: TensorSpec) -> TensorSpec:
        return TensorSpec(a.input, a.dtype, tuple(i if i == j else -1 for i, j in zip(a.shape, b.shape, strict=True)))

    return {name: combine(spec, large[name]) for name, spec in small.items()}


class ConditionGraph(nn.Module):
    """Graph that runs once per image and computes what all its steps share, for any output size."""

    def __init__(self, decoder: FoldedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor, caption: Tensor) -> tuple[Tensor, ...]:
        """Condition on a latent and a caption.

        Args:
            latent: [1, c, h, w] float32.
            caption: [1, T, E] float32.

        Returns:
            Caption tokens [1, T, D], then `PidConfig.token_sets` sets of adapter tokens [1, R, C, D], in the dtype
            of the network.
        """
        adapter, pixel, y = self.decoder.encode(latent, caption)
        return (y, *adapter, *(() if pixel is None else (pixel,)))


class StepGraph(nn.Module):
    """Graph that runs once per step: computes the velocity and applies the sampler's update, in float32.

    It serves every output size, because all that depends on the size is an input, but only one length of captions.
    """

    transitions: Tensor  # [N, 2] float32: t, next t
    rows: Tensor  # [N]: row of t in the folded tables
    caption_cos: Tensor  # [T, d/2] float32
    caption_sin: Tensor

    def __init__(self, decoder: FoldedDecoder, caption_tokens: int) -> None:
        super().__init__()
        self.decoder = decoder
        device = decoder.y_pos_embedding.device
        self.register_buffer("transitions", torch.tensor(STEP_TRANSITIONS, device=device), persistent=False)
        rows = [decoder.row(t) for t, _ in STEP_TRANSITIONS]
        self.register_buffer("rows", torch.tensor(rows, device=device), persistent=False)
        cos, sin = caption_rotary(caption_tokens, decoder.config.head_width, device)
        self.register_buffer("caption_cos", cos, persistent=False)
        self.register_buffer("caption_sin", sin, persistent=False)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        step_index: Tensor,
        noise: Tensor,
        caption_tokens: Tensor,
        tokens: Sequence[Tensor],
        tables: Sequence[Tensor],
    ) -> Tensor:
        """Run one step; samples of a batch may be at different steps.

        Args:
            x: [B, 3, H, W] float32.
            sigma: [B] float32.
            step_index: [B] int64, rows of `sampler.STEP_TRANSITIONS`.
            noise: [B, 3, H, W] float32. Must be finite even for a step to t = 0, which multiplies it by 0.
            caption_tokens: [B, T, D], from the condition graph.
            tokens: Each [B, R, C, D], from the condition graph.
            tables: The fields of `positions.Geometry` for the output size.

        Returns:
            The next x.
        """
        count = self.decoder.config.injections
        pixel = tokens[count] if self.decoder.config.pixel_injection else None
        rotary = self.caption_cos, self.caption_sin
        conditioning = Conditioning(tokens[:count], pixel, caption_tokens, Geometry(*tables), rotary)
        velocity = self.decoder.velocity_at(x, self.rows.index_select(0, step_index), conditioning, sigma)
        t, next_t = self.transitions.index_select(0, step_index).view(-1, 2, 1, 1, 1).unbind(1)
        return advance(x, velocity, t, next_t, noise)
