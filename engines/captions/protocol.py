"""The interface of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TextEncoderInfo:
    """Properties of a text encoder."""

    name: str  # such as gemma-2-2b-it
    identity: str  # SHA-256 of all that determines an embedding: weights, tokenizer, prefix, tokens, dtype
    tokens: int  # of each embedding, padding included
    width: int
    prefix_tokens: int  # of the instruction text before each prompt, with the token that begins the text
    device: str  # PyTorch name, such as cpu or cuda:0
    max_batch: int  # prompts that are encoded at once


class TextEncoder(Protocol):
    """Encodes prompts. Not thread-safe."""

    info: TextEncoderInfo

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [B, tokens, width] of 1 to `max_batch` prompts, bfloat16 on the CPU.

        The prompts have no fault (`prompt_fault`). Words beyond the number of tokens have no effect.

        Raises:
            DecodeError: The model failed, or computed NaN or infinity.
            DeviceMemoryError: The device is out of memory.
            DeviceLostError: The device no longer works.
            MemoryError: The host is out of memory.
        """
