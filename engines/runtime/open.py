"""Opens the runtime that the manifest of a bundle specifies."""

from __future__ import annotations

import torch

from engines.bundle import Bundle, empty_caption, load_folded
from engines.errors import ConfigError
from engines.machine import device_name
from engines.runtime.cuda_graphs import device_errors
from engines.runtime.device_runtime import Backend, DeviceRuntime
from engines.runtime.protocol import RuntimeInfo
from engines.runtime.tensorrt_runtime import open_engines
from engines.runtime.torch_runtime import TorchBackend


def open_runtime(
    bundle: Bundle,
    device: torch.device | str = "cpu",
    slots: int | None = None,
    max_batch: int | None = None,
    compiled: bool | None = None,
) -> DeviceRuntime:
    """Open the runtime of a bundle.

    Args:
        bundle: A bundle with weights or with compiled engines.
        device: Device to decode on.
        slots: Images that may be between start and release; by default `max_batch` + 1, so that one can be paused.
        max_batch: Largest batch; by default, and at most, that of the bundle.
        compiled: Whether to use torch.compile; by default only on CUDA. Not supported for compiled engines.

    Raises:
        BundleError: The bundle does not match this machine.
        ConfigError: The bundle does not support this device or option.
        DeviceMemoryError: The weights do not fit into the device's memory.
    """
    device = torch.device(device)
    info = runtime_info(bundle, device, slots, max_batch)
    backend: Backend
    with device_errors():
        if bundle.manifest.runtime.kind == "tensorrt":
            if compiled:
                raise ConfigError(f"{bundle.path} contains compiled engines, which do not support --compile; omit it.")
            backend = open_engines(bundle, device)
        else:
            backend = TorchBackend(load_folded(bundle, device), device.type == "cuda" if compiled is None else compiled)
    return DeviceRuntime(backend, empty_caption(bundle), info)


def runtime_info(bundle: Bundle, device: torch.device, slots: int | None, max_batch: int | None) -> RuntimeInfo:
    """Return the properties of a runtime for `bundle` on `device`; see `open_runtime` for the defaults."""
    manifest = bundle.manifest
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
        sizes=manifest.sizes,
        max_batch=max_batch,
        slots=slots or max_batch + 1,
        precision=manifest.precision,
        kind=manifest.runtime.kind,
        device=device_name(device),
        notes=tuple(manifest.warnings),
    )
