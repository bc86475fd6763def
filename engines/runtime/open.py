"""Opens the runtime that the manifest of a bundle specifies."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from engines.bundle import Bundle, empty_caption, load_folded
from engines.errors import ConfigError
from engines.machine import device_name
from engines.runtime.backend import Backend
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.cuda_graphs import device_errors
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.tensorrt_runtime import open_engines
from engines.runtime.torch_runtime import Kernels, TorchBackend
from engines.runtime.weight_memory import WeightPool
from engines.runtime.weights import MovableWeights
from engines.size import Size

log = logging.getLogger(__name__)


def open_runtime(
    bundle: Bundle,
    device: torch.device | str = "cpu",
    slots: int | None = None,
    max_batch: int | None = None,
    compiled: bool | None = None,
    sizes: Sequence[Size] | None = None,
    kernels: Kernels = "auto",
    max_pixels: int | None = None,
    buffers: DeviceBuffers | None = None,
    weights: WeightPool | None = None,
) -> DeviceRuntime:
    """Open the runtime of a bundle.

    Args:
        bundle: A bundle with weights or with compiled engines.
        device: Device to decode on.
        slots: Images that may be between start and release; by default `max_batch` + 1, so that one can be paused.
        max_batch: Largest batch; by default, and at most, that of the bundle.
        compiled: Whether to use torch.compile; by default only on CUDA. Not supported for compiled engines.
        sizes: Output sizes; by default those of the bundle. PyTorch can decode any size that the decoder supports,
            compiled engines those of the bundle and of its range of sizes.
        kernels: Kernels to choose from on CUDA; see `TorchBackend`. Not supported for compiled engines.
        max_pixels: Largest area of an image that is decoded in tiles; each slot needs 24 more bytes per pixel for it.
            None: images of other sizes are rejected.
        buffers: Memory that it shares with other runtimes of the device, none of which has been warmed up; by default
            it has its own.
        weights: Pool of the device, for weights that can move to host memory. They are there until the warm-up, so
            that more decoders can be opened than fit on the device. None: the weights stay on the device.

    Raises:
        BundleError: The bundle does not match this machine.
        ConfigError: The bundle does not support this device, option or size.
        DeviceMemoryError: The weights do not fit into the device's memory.
    """
    device = torch.device(device)
    info = runtime_info(bundle, device, slots, max_batch, sizes)
    info = info.with_tiles(max_pixels)
    if info.max_pixels != max_pixels:
        log.warning("%s: no image of at most %d pixels can be decoded in tiles", bundle.path, max_pixels)
    backend: Backend
    movable: MovableWeights | None = None
    with device_errors():
        if bundle.manifest.runtime.kind == "tensorrt":
            if compiled:
                raise ConfigError(f"{bundle.path} contains compiled engines, which do not support --compile; omit it.")
            if kernels != "auto":
                raise ConfigError(
                    f"{bundle.path} contains compiled engines, which have their own kernels; omit --kernels."
                )
            if weights is not None:
                raise ConfigError(
                    f"{bundle.path} contains compiled engines, whose weights cannot move to host memory; "
                    "omit --resident."
                )
            backend = open_engines(bundle, device)
        else:
            compiled = device.type == "cuda" if compiled is None else compiled
            decoder = load_folded(bundle, "cpu" if weights is not None else device)
            movable = None if weights is None else MovableWeights(decoder, weights)
            backend = TorchBackend(decoder, compiled, kernels, None if weights is None else weights.device)
    return DeviceRuntime(backend, empty_caption(bundle), info, buffers, movable)


def runtime_info(
    bundle: Bundle,
    device: torch.device,
    slots: int | None,
    max_batch: int | None,
    sizes: Sequence[Size] | None = None,
) -> RuntimeInfo:
    """Return the properties of a runtime for `bundle` on `device`; see `open_runtime` for the defaults.

    Raises:
        ConfigError: The bundle does not support a size.
    """
    manifest = bundle.manifest
    sizes = tuple(dict.fromkeys(manifest.sizes if sizes is None else sizes))
    for size in sizes:
        manifest.network.latent_size(size)
        if manifest.engines:
            manifest.profile_for(size)
    max_batch = min(max_batch or manifest.max_batch, manifest.max_batch)
    return RuntimeInfo(
        decoder=manifest.decoder,
        latent_space=manifest.latent_space.name,
        latent_channels=manifest.latent_space.channels,
        pixels_per_cell=manifest.latent_space.pixels_per_cell,
        upscale=manifest.upscale,
        sigma_frame=manifest.latent_space.sigma_frame,
        caption_tokens=manifest.empty_caption.tokens,
        caption_width=manifest.network.caption_width,
        sizes=sizes,
        max_batch=max_batch,
        slots=slots or max_batch + 1,
        precision=manifest.precision,
        kind=manifest.runtime.kind,
        device=device_name(device),
        notes=tuple(manifest.warnings),
    )
