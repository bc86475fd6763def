"""A bundle with random weights, written within seconds: for measuring a server on a rented machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

import engines
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.networks import folded_network
from engines.bundle import CAPTION_KEY, DTYPES, WEIGHTS, Bundle, write_bundle
from engines.compile.describe_bundle import OWN_LICENCE, latent_space_entry
from engines.compile.weights import CAPTION_FILE
from engines.manifest import EmptyCaption, Manifest, Origin, Precision, Quantisation, Verification
from engines.pid import FoldedDecoder
from engines.pid.fp8 import Fp8Linear
from engines.pid.sampler import MODEL_TIMESTEPS

_WARNING = "The weights are random and were not verified: this bundle is only for measuring a server."


def write_random_bundle(config: RunConfig, precision: Precision, path: Path) -> Bundle:
    """Write a bundle of the measured decoder for its main size. The network is made on the device.

    The builder would check and verify it for minutes on the CPU.
    """
    folded = folded_network(config, precision)
    caption = torch.zeros(folded.config.caption_tokens, folded.config.caption_width, dtype=DTYPES[precision])
    return write_bundle(
        path,
        _manifest(config, folded, precision),
        {
            WEIGHTS: lambda file: save_file(folded.state_dict(), file),
            CAPTION_FILE: lambda file: save_file({CAPTION_KEY: caption}, file),
        },
    )


def _manifest(config: RunConfig, folded: FoldedDecoder, precision: Precision) -> Manifest:
    description, network = config.description, folded.config
    layers = sum(isinstance(module, Fp8Linear) for module in folded.modules())
    unknown = Verification(
        velocity_error=(0.0,) * len(MODEL_TIMESTEPS), max_velocity_error=0.0, precision_error=0.0, method="none"
    )
    quantisation = Quantisation(
        layers=max(1, layers), calibration="synthetic latents", synthetic=True, velocity_error=0.0, image_psnr=0.0
    )
    return Manifest(
        decoder=description.name,
        latent_space=latent_space_entry(description.latent_space),
        upscale=network.upscale,
        network=network,
        target="cuda" if config.on_cuda else "cpu",
        precision=precision,
        sizes=(config.main_size,),
        max_batch=1,
        times=MODEL_TIMESTEPS,
        origin=Origin(kind="random", seed=0),
        empty_caption=EmptyCaption(file=CAPTION_FILE, tokens=network.caption_tokens, zeros=True),
        warnings=(_WARNING,),
        verification=unknown,
        quantisation=quantisation if precision == "fp8" else None,
        created=datetime.now(UTC),
        builder_version=engines.__version__,
        torch_version=torch.__version__,
        licence=OWN_LICENCE,
    )
