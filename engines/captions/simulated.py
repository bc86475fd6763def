"""Text encoder that sleeps instead of computing, for tests and load tests."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engines.captions.protocol import TextEncoderInfo


class SimulatedTextEncoder:
    """Sleeps for a fixed time per batch; implements `protocol.TextEncoder`."""

    def __init__(self, tokens: int = 300, width: int = 2304, seconds: float = 0.0, max_batch: int = 1) -> None:
        """Create an encoder.

        Args:
            tokens: Tokens of each embedding.
            width: Width of the embeddings.
            seconds: Time of each batch, whatever the number of prompts.
            max_batch: Largest batch.
        """
        self.info = TextEncoderInfo(
            name="simulated",
            identity=hashlib.sha256(f"simulated, {tokens} tokens, width {width}".encode()).hexdigest(),
            tokens=tokens,
            width=width,
            prefix_tokens=1,
            device="simulated",
            max_batch=max_batch,
        )
        self.seconds = seconds

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Sleep, then return embeddings [B, tokens, width] bfloat16 that depend on the prompts alone."""
        if not 1 <= len(prompts) <= self.info.max_batch:
            raise ValueError(f"{len(prompts)} prompts; a batch has 1 to {self.info.max_batch}")
        if self.seconds > 0:
            time.sleep(self.seconds)
        return torch.stack([self._embedding(prompt) for prompt in prompts])

    def _embedding(self, prompt: str) -> Tensor:
        """Return one random row per prompt, repeated: far cheaper than a random value for each element."""
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little")
        row = torch.randn(self.info.width, generator=torch.Generator().manual_seed(seed))
        return row.bfloat16().expand(self.info.tokens, self.info.width)
