"""Folding: replaces everything that depends only on the timestep by tables with one row per timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from engines.errors import InputError
from engines.pid.blocks import PixelBlock
from engines.pid.config import PidConfig
from engines.pid.fp8_attention import add_fp8_attention
from engines.pid.network import Conditioning, Network, PidDecoder, batch_vector
from engines.pid.quantised import replace_with_quantised_layers


class FoldedDecoder(Network):
    """Decoder for a fixed list of timesteps.

    Float32 tables replace the time embedder and the modulation layers of the patch blocks (397 M of the 1362 M
    parameters of a released decoder). The caption branch of the last block, which nothing reads, is removed.
    """

    embedding_table: Tensor  # [timesteps, 1, D]
    modulation_table: Tensor  # [timesteps, blocks, 2 (image, caption), 1, 6D]

    def __init__(self, config: PidConfig, timesteps: Sequence[float]) -> None:
        super().__init__(config, live=False)
        self.timesteps = tuple(timesteps)
        width, blocks = config.hidden_size, config.patch_depth
        self.register_buffer("embedding_table", torch.zeros(len(timesteps), 1, width))
        self.register_buffer("modulation_table", torch.zeros(len(timesteps), blocks, 2, 1, 6 * width))

    @classmethod
    def for_state(cls, config: PidConfig, timesteps: Sequence[float], state: Mapping[str, Tensor]) -> Self:
        """Make a decoder on the meta device whose layers and attentions are quantised if `state` has their scales."""
        with torch.device("meta"):
            decoder = cls(config, timesteps)
        replace_with_quantised_layers(decoder, state)
        add_fp8_attention(decoder, state)
        return decoder

    def row(self, t: float) -> int:
        """Return the table row of timestep t.

        Raises:
            InputError: The decoder is not folded for t.
        """
        for row, timestep in enumerate(self.timesteps):
            if abs(timestep - t) < 1e-6:
                return row
        raise InputError(f"This decoder is folded for the timesteps {self.timesteps}; {t:g} is not supported.")

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor:
        """Return the velocity as `PidDecoder.velocity` does; each t must be one of `timesteps`."""
        timesteps = batch_vector(t, x.shape[0], torch.device("cpu")).tolist()
        rows = torch.tensor([self.row(timestep) for timestep in timesteps], device=x.device)
        return self.velocity_at(x, rows, conditioning, batch_vector(sigma, x.shape[0], x.device))

    def velocity_at(self, x: Tensor, rows: Tensor, conditioning: Conditioning, sigma: Tensor) -> Tensor:
        """Return the velocity, with t given as table rows [B] on the device, which avoids waiting for the host."""
        e = self.embedding_table.index_select(0, rows).to(self.dtype)  # [B, 1, D]
        modulation = self.modulation_table.index_select(0, rows).to(self.dtype)  # [B, blocks, 2, 1, 6D]
        image, caption = modulation.unbind(2)
        return self.denoise(x, conditioning, sigma, e, image.unbind(1), caption.unbind(1))


@torch.no_grad()
def fold(decoder: PidDecoder, timesteps: Sequence[float]) -> FoldedDecoder:
    """Fold a decoder for `timesteps`.

    The result has the same dtype and device, and shares the tensors that folding does not change.
    """
    with torch.device("meta"):
        folded = FoldedDecoder(decoder.config, timesteps)
    folded.pixel_memory_budget = decoder.pixel_memory_budget
    folded.load_state_dict(_folded_state(decoder, timesteps), strict=True, assign=True)
    return folded.eval().requires_grad_(False)


def _folded_state(decoder: PidDecoder, timesteps: Sequence[float]) -> dict[str, Tensor]:
    config = decoder.config
    state = {
        key: value
        for key, value in decoder.state_dict().items()
        if not key.startswith("t_embedder.") and "adaLN_modulation" not in key
    }
    last = f"patch_blocks.{config.patch_depth - 1}."
    for key in [key for key in state if key.startswith(last)]:
        if key.startswith((f"{last}mlp_y.", f"{last}norm_y2.", f"{last}attn.proj_y.", f"{last}attn.q_norm_y.")):
            del state[key]
    # Without a caption output the last block computes only keys and values of the caption.
    qkv_y = f"{last}attn.qkv_y.weight"
    state[qkv_y] = state[qkv_y][config.hidden_size :].clone()
    for i, block in enumerate(decoder.pixel_blocks):
        assert isinstance(block, PixelBlock)  # noqa: S101  for mypy: a ModuleList is untyped
        before, after = block.split_modulation()
        prefix = f"pixel_blocks.{i}.modulation"
        state[f"{prefix}_in.weight"], state[f"{prefix}_in.bias"] = (tensor.contiguous() for tensor in before)
        state[f"{prefix}_out.weight"], state[f"{prefix}_out.bias"] = (tensor.contiguous() for tensor in after)
    embedding = decoder.t_embedder(torch.tensor(timesteps, dtype=torch.float32, device=decoder.y_pos_embedding.device))
    image, caption = (torch.stack(stream, dim=1) for stream in decoder.modulations(embedding))  # [N, blocks, 1, 6D]
    state["embedding_table"] = embedding.float()
    state["modulation_table"] = torch.stack((image, caption), dim=2).float()
    return state
