"""Stage one: weights and the empty caption, from files or made up."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engines.bundle import CAPTION_KEY, sha256
from engines.compile.plan import BuildPlan
from engines.errors import ConfigError
from engines.manifest import Origin
from engines.pid import PidConfig, PidDecoder, load_checkpoint


def load_decoder(plan: BuildPlan) -> tuple[PidDecoder, Origin]:
    """The network to build, in float32 on the CPU. Raises CheckpointError."""
    config = plan.description.config
    if plan.checkpoint is None:
        return random_decoder(config, plan.seed), Origin(kind="random", seed=plan.seed)
    decoder = load_checkpoint(plan.checkpoint, config, torch.float32)
    digest = sha256(plan.checkpoint)
    return decoder, Origin(kind="bundled" if plan.bundled else "checkpoint", file=plan.checkpoint.name, sha256=digest)


def random_decoder(config: PidConfig, seed: int, device: torch.device | str = "cpu") -> PidDecoder:
    """A decoder whose activations stay of order one: matrices scaled by 1/√fan-in, gains one, biases small.

    The same seed draws differently on another kind of device.
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


def load_empty_caption(path: Path | None, config: PidConfig, tokens: int | None = None) -> Tensor:
    """The tensor `caption` [T, E] of a safetensors file, or zeros, by default at full length. Raises ConfigError."""
    if path is None:
        return torch.zeros(tokens or config.caption_tokens, config.caption_width)
    try:
        caption = load_file(path).get(CAPTION_KEY)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a safetensors file ({error}).") from error
    expected = f"[1..{config.caption_tokens}, {config.caption_width}]"
    if caption is None:
        raise ConfigError(f"{path} holds no tensor {CAPTION_KEY} {expected}.")
    tokens, width = caption.shape if caption.ndim == 2 else (0, 0)
    if not 1 <= tokens <= config.caption_tokens or width != config.caption_width:
        raise ConfigError(f"{CAPTION_KEY} in {path} has shape {list(caption.shape)}, this decoder takes {expected}.")
    if not caption.is_floating_point() or not caption.float().isfinite().all():
        raise ConfigError(f"{CAPTION_KEY} in {path} must be finite floating-point numbers.")
    return caption
