"""Load stage: reads the network and the empty caption from files, or uses random weights and a caption of zeros."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engines.bundle import CAPTION_KEY, sha256
from engines.compile.inputs.random_weights import random_decoder
from engines.compile.inputs.tensor_files import is_finite, load_tensors
from engines.compile.planning.plan import BuildPlan
from engines.errors import ConfigError
from engines.manifest import Origin
from engines.pid import PidConfig, PidDecoder, load_checkpoint


def load_decoder(plan: BuildPlan) -> tuple[PidDecoder, Origin]:
    """Load the network to build, in float32 on the CPU, and describe where its weights come from.

    Raises:
        CheckpointError: The checkpoint is damaged or does not match the decoder.
    """
    config = plan.decoder.config
    if plan.checkpoint is None:
        seed = plan.options.random_seed or 0
        return random_decoder(config, seed), Origin(kind="random", seed=seed)
    decoder = load_checkpoint(plan.checkpoint, config, torch.float32)
    kind = "bundled" if plan.bundled_weights else "checkpoint"
    return decoder, Origin(kind=kind, file=plan.checkpoint.name, sha256=sha256(plan.checkpoint))


def load_empty_caption(path: Path | None, config: PidConfig, tokens: int | None = None) -> Tensor:
    """Load the caption embedding [T, E] of requests without a caption.

    Args:
        path: A safetensors file with a tensor `caption`; None for zeros.
        config: Dimensions of the network.
        tokens: Length of the zeros; by default the maximum of the network.

    Raises:
        ConfigError: The file cannot be read, or its tensor does not match the network.
    """
    if path is None:
        return torch.zeros(tokens or config.caption_tokens, config.caption_width)
    caption = load_tensors(path).get(CAPTION_KEY)
    expected = f"[1..{config.caption_tokens}, {config.caption_width}]"
    if caption is None:
        raise ConfigError(f"{path} has no tensor {CAPTION_KEY!r}; expected one of shape {expected}.")
    tokens, width = caption.shape if caption.ndim == 2 else (0, 0)
    if not 1 <= tokens <= config.caption_tokens or width != config.caption_width:
        raise ConfigError(f"{CAPTION_KEY!r} in {path} has shape {list(caption.shape)}; this decoder needs {expected}.")
    if not is_finite(caption):
        raise ConfigError(f"{CAPTION_KEY!r} in {path} must contain only finite floating-point numbers.")
    return caption
