"""Small folded networks for the tests of the builder."""

from __future__ import annotations

from dataclasses import replace

import torch

from engines.compile.inputs.calibrate import Ranges, calibrate, synthetic_calibration
from engines.compile.inputs.random_weights import random_decoder
from engines.compile.planning.attention import BOTH
from engines.compile.planning.layer_rules import assign_rules, attention_names, linear_layers
from engines.pid import FoldedDecoder, PidConfig, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from tests.tiny import TINY

# The options of released v1.5 decoders, and a block between the first and the last one.
V15 = replace(TINY, patch_depth=3, pixel_injection=True, gate_per_channel=False, adapter_padding="replicate")


def ignore_progress(_detail: str) -> None:
    """Discard progress messages."""


def network_of(config: PidConfig) -> FoldedDecoder:
    """Return a folded network with random weights, always the same for a configuration."""
    return fold(random_decoder(config, 0), MODEL_TIMESTEPS)


def calibrated(network: FoldedDecoder, pixels: int = 64) -> Ranges:
    """Calibrate all layers and attentions of a network with two small synthetic latents."""
    layers = [layer for layer, rule in assign_rules(linear_layers(network), ()).items() if rule.quantised]
    samples = synthetic_calibration(network.config)
    cells = max(1, pixels // network.config.cell_side)
    small = replace(samples, samples=tuple(replace(s, latent=s.latent[:, :cells, :cells]) for s in samples.samples[:2]))
    caption = torch.zeros(4, network.config.caption_width)
    names = attention_names(network, BOTH)
    return calibrate(network, small, caption, layers, names, ignore_progress)[0]
