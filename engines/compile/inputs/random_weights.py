"""Random weights, for benchmarks and tests that need no trained network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engines.pid import PidConfig, PidDecoder


def random_decoder(config: PidConfig, seed: int, device: torch.device | str = "cpu") -> PidDecoder:
    """Return a float32 decoder with random weights whose activations stay of order one.

    Matrices are normal with standard deviation 1/√fan-in, gains are one and biases small. A seed gives different
    weights on CPU and CUDA.
    """
    with torch.device("meta"):
        decoder = PidDecoder(config)
    generator = torch.Generator(device).manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, tensor in decoder.state_dict().items():
        value = torch.empty(tensor.shape, device=device)
        if tensor.ndim >= 2:
            value.normal_(std=1 / math.sqrt(math.prod(tensor.shape[1:])), generator=generator)
        elif key.endswith("weight"):
            value.fill_(1)
        else:
            value.normal_(std=0.02, generator=generator)
        state[key] = value
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)
