"""Dimensions and files of the bundled decoder. See docs/bundled-decoder.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.bundled import dct
from engines.pid import PidConfig
from engines.pid.released import DecoderDescription, LatentSpace, LatentStatistics
from engines.pixels import from_uint8
from engines.size import Size

NAME = "dct-demo"
CHECKPOINT = Path(__file__).with_name("decoder.safetensors")
PHOTO = Path(__file__).with_name("photo.jpg")  # 512 × 512, not among the training photos

# The dimensions, under the key names of published configurations.
PUBLISHED: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 16,
    "hidden_size": 192,
    "num_groups": 4,
    "patch_depth": 2,
    "pixel_depth": 1,
    "pixel_hidden_size": 4,
    "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2,
    "txt_embed_dim": 16,
    "txt_max_length": 4,
    "lq_latent_channels": dct.CHANNELS,
    "latent_spatial_down_factor": dct.BLOCK,
    "sr_scale": dct.UPSCALE,
    "lq_hidden_dim": 256,
    "lq_num_res_blocks": 5,
    "lq_interval": 1,
    "lq_gate_type": "sigma_aware_per_token",
    "lq_conv_padding_mode": "replicate",
    "pit_lq_inject": True,
    "rope_ref_h": 512,
    "rope_ref_w": 512,
}
CONFIG = PidConfig.from_published(PUBLISHED)
CAPTION_TOKENS = 1  # zeros, as in training
DESCRIPTION = DecoderDescription(
    NAME,
    CONFIG,
    LatentSpace(
        "dct",
        CONFIG.latent_channels,
        CONFIG.pixels_per_cell,
        models=(),
        normalisation="4×4 block DCT of YCbCr, scaled to unit variance, see engines.bundled.dct",
        statistics=LatentStatistics((1.0,)),  # there are no other latents
    ),
    sizes=(Size(512, 512), Size(256, 256), Size(384, 512), Size(512, 384)),
    max_side=512,
    empty_tokens=CAPTION_TOKENS,
)


def read_photo(path: Path = PHOTO) -> Tensor:
    """Read an image file as [3, H, W] float32 in [-1, 1]."""
    with Image.open(path) as photo:
        return from_uint8(torch.from_numpy(np.array(photo.convert("RGB"))))
