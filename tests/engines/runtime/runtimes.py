"""Runtimes of a tiny decoder, and functions to decode with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engines.bundle import CAPTION_KEY, WEIGHTS, load_folded, write_bundle
from engines.compile.planning.layer_rules import assign_rules, linear_layers
from engines.compile.variants import cast
from engines.pid import FoldedDecoder, PidDecoder, fold
from engines.pid.fp4 import Fp4Linear
from engines.pid.quantised import quantise
from engines.pid.sampler import MODEL_TIMESTEPS, step_indices
from engines.runtime.backend import Backend
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import Runtime, RuntimeInfo, Sample
from engines.runtime.tensorrt_runtime import TensorRTBackend
from engines.runtime.torch_runtime import TorchBackend
from engines.runtime.trt import KernelCache
from engines.size import Size
from tests.conftest import BuildOnce
from tests.engines.runtime.fake_tensorrt import engine_bundle, fake_tensorrt
from tests.engines.runtime.real_engines import PACKAGES, real_backend
from tests.tiny import TINY, manifest

SIZE, WIDE = Size(64, 64), Size(64, 96)
IN_TILES = Size(128, 160)
CONFIG = replace(TINY, patch_depth=3, pixel_depth=2, pixel_injection=True, gate_per_channel=False)

INFO = RuntimeInfo(
    decoder="tiny",
    latent_space="flux",
    latent_channels=16,
    pixels_per_cell=8,
    upscale=4,
    sigma_frame="flow",
    caption_tokens=5,
    caption_width=24,
    sizes=(SIZE, WIDE),
    max_batch=3,
    slots=4,
    precision="fp32",
    kind="torch",
    device="cpu",
)
TILED_INFO = replace(INFO, max_pixels=IN_TILES.area)


def make_decoder(device: str | torch.device) -> FoldedDecoder:
    """Return a tiny decoder, always with the same weights."""
    torch.manual_seed(0)
    return fold(PidDecoder(CONFIG), MODEL_TIMESTEPS).to(device)


def fake_engines(folder: Path) -> TensorRTBackend:
    """Load engines of the fake TensorRT."""
    bundle = engine_bundle(folder / "tiny", network=CONFIG, sizes=(SIZE, WIDE))
    kernels = KernelCache(folder / "kernels")
    return TensorRTBackend(bundle, fake_tensorrt(make_decoder("cpu")), torch.device("cpu"), kernels)


def fp4_decoder(folder: Path, device: str | torch.device) -> FoldedDecoder:
    """Return the tiny decoder with all layers in FP4 that may be, loaded from a bundle."""
    decoder = make_decoder("cpu")
    layers = [name for name, rule in assign_rules(linear_layers(decoder), ()).items() if rule.quantised]
    quantise(decoder, dict.fromkeys(layers, 8.0), Fp4Linear)
    cast(decoder, torch.bfloat16)
    quantisation = {
        "layers": len(layers),
        "fp4_layers": len(layers),
        "fp4_share": 1.0,
        "calibration": "",
        "synthetic": True,
        "velocity_error": 0.1,
        "image_psnr": 40.0,
    }
    described = manifest(network=CONFIG, sizes=(SIZE, WIDE), max_batch=3, precision="fp4", quantisation=quantisation)
    files = {
        WEIGHTS: lambda path: save_file(decoder.state_dict(), path),
        described.empty_caption.file: lambda path: save_file({CAPTION_KEY: torch.zeros(5, 24)}, path),
    }
    return load_folded(write_bundle(folder / "fp4", described, files), device)


def ready(backend: Backend, info: RuntimeInfo = INFO) -> DeviceRuntime:
    """Return a runtime that has been warmed up."""
    runtime = DeviceRuntime(backend, torch.zeros(5, 24), info)
    runtime.warm_up()
    return runtime


ON_DEVICE = ("torch-cpu", "torch-cuda", "fake-engines", *(f"{package}-cuda" for package in PACKAGES))


def params(names: Iterable[str]) -> list[Any]:
    """Return parameters for a fixture, with those that need a GPU marked."""
    return [pytest.param(name, marks=pytest.mark.gpu if name.endswith("cuda") else ()) for name in names]


def make_backend(name: str, folder: Path, build_once: BuildOnce) -> Backend:
    """Return one of the backends in ON_DEVICE, or `torch-fp4-cpu`; `folder` is for its files."""
    kind, _, device = name.rpartition("-")
    if kind == "torch":
        return TorchBackend(make_decoder(device))
    if kind == "torch-fp4":
        return TorchBackend(fp4_decoder(folder, device))
    if kind == "fake":
        return fake_engines(folder)
    return real_backend(kind, make_decoder("cpu"), (SIZE, WIDE), build_once)


def make_sample(number: int = 0, size: Size = SIZE, **fields) -> Sample:
    """Return a sample whose latent and seed depend on `number`."""
    latent = torch.randn(16, *INFO.latent_size(size), generator=torch.Generator().manual_seed(number))
    return Sample(latent, size, **{"seed": number, **fields})


def pixels(runtime: Runtime, slot: int) -> np.ndarray:
    """Finish an image, release its slot, and return the pixels [H, W, 3] uint8."""
    rows = runtime.finish(slot)
    rows.wait(rows.pixels.shape[0])
    copy = rows.pixels.copy()
    rows.close()
    runtime.release(slot)
    return copy


def decode(runtime: Runtime, sample: Sample, steps: int = 4) -> np.ndarray:
    """Decode a sample alone and return the pixels [H, W, 3] uint8."""
    slot = runtime.start(sample)
    for index in step_indices(steps):
        step(runtime, slot, index, sample.size)
    return pixels(runtime, slot)


def step(runtime: Runtime, slot: int, index: int, size: Size) -> None:
    """Run one step of an image alone, with all its tiles if it has any."""
    for _ in range(len(runtime.info.tiles(size) or [size])):
        runtime.step([slot], [index])


def levels(runtime: Runtime) -> int:
    """Return by how many of 255 levels images from different kernels may differ; TensorRT may use TF32."""
    real = isinstance(runtime, DeviceRuntime) and isinstance(runtime.backend, TensorRTBackend)
    return 8 if real and runtime.device.type == "cuda" else 1
