"""Folding: the decoder with everything that depends on the time alone turned into tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.errors import InputError
from engines.pid.blocks import PixelBlock
from engines.pid.config import PidConfig
from engines.pid.network import Conditioning, Network, PidDecoder, batch_vector


class FoldedDecoder(Network):
    """A decoder for a fixed list of times.

    The time embedder and the patch blocks' modulation layers (397 M of a released decoder's 1362 M parameters) are
    replaced by float32 tables with a row a time; the last block's caption branch, which nothing reads, is gone.
    """

    embedding_table: Tensor  # [times, 1, D]
    modulation_table: Tensor  # [times, blocks, 2 (image, caption), 1, 6D]

    def __init__(self, config: PidConfig, times: Sequence[float]) -> None:
        super().__init__(config, live=False)
        self.times = tuple(times)
        width, blocks = config.hidden_size, config.patch_depth
        self.register_buffer("embedding_table", torch.zeros(len(self.times), 1, width))
        self.register_buffer("modulation_table", torch.zeros(len(self.times), blocks, 2, 1, 6 * width))

    def row(self, t: float) -> int:
        """The table row of time t. Raises InputError for a time that was not folded in."""
        for row, time in enumerate(self.times):
            if abs(time - t) < 1e-6:
                return row
        raise InputError(f"This decoder is folded for the times {self.times}; {t:g} is none of them.")

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor:
        """As `PidDecoder.velocity`; each t must be one of `times`."""
        times = batch_vector(t, x.shape[0], torch.device("cpu")).tolist()
        rows = torch.tensor([self.row(time) for time in times], device=x.device)
        return self.velocity_at(x, rows, conditioning, batch_vector(sigma, x.shape[0], x.device))

    def velocity_at(self, x: Tensor, rows: Tensor, conditioning: Conditioning, sigma: Tensor) -> Tensor:
        """The same with t given as table rows [B] on the device, so that nothing waits for the host."""
        e = self.embedding_table.index_select(0, rows).to(self.dtype)  # [B, 1, D]
        modulation = self.modulation_table.index_select(0, rows).to(self.dtype)  # [B, blocks, 2, 1, 6D]
        image, caption = modulation.unbind(2)
        return self.denoise(x, conditioning, sigma, e, image.unbind(1), caption.unbind(1))


@torch.no_grad()
def fold(decoder: PidDecoder, times: Sequence[float]) -> FoldedDecoder:
    """Fold `decoder` for `times`. The result shares the tensors that both have, and its dtype and device."""
    with torch.device("meta"):
        folded = FoldedDecoder(decoder.config, times)
    folded.pixel_memory_budget = decoder.pixel_memory_budget
    folded.load_state_dict(_folded_state(decoder, times), strict=True, assign=True)
    return folded.eval().requires_grad_(False)


def _folded_state(decoder: PidDecoder, times: Sequence[float]) -> dict[str, Tensor]:
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
    # Without its caption output the last block asks the caption for keys and values only.
    qkv_y = f"{last}attn.qkv_y.weight"
    state[qkv_y] = state[qkv_y][config.hidden_size :].clone()
    for i, block in enumerate(decoder.pixel_blocks):
        assert isinstance(block, PixelBlock)  # noqa: S101  a ModuleList forgets its types
        before, after = block.split_modulation()
        prefix = f"pixel_blocks.{i}.modulation"
        state[f"{prefix}_in.weight"], state[f"{prefix}_in.bias"] = (tensor.contiguous() for tensor in before)
        state[f"{prefix}_out.weight"], state[f"{prefix}_out.bias"] = (tensor.contiguous() for tensor in after)
    embedding = decoder.t_embedder(torch.tensor(times, dtype=torch.float32, device=decoder.y_pos_embedding.device))
    image, caption = (torch.stack(stream, dim=1) for stream in decoder.modulations(embedding))  # [times, blocks, 1, 6D]
    state["embedding_table"] = embedding.float()
    state["modulation_table"] = torch.stack((image, caption), dim=2).float()
    return state
