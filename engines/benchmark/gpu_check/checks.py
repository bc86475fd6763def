"""Checks of the guarantees that the scheduler relies on, with a toy network on this device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from engines.accuracy import relative_error
from engines.benchmark.decoders import make_runtime
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement
from engines.compile.inputs.random_weights import random_decoder
from engines.errors import DecodeError
from engines.pid import FoldedDecoder, NoiseSource, fold, sample
from engines.pid.fp4 import Fp4Linear, has_fp4_products
from engines.pid.fp8 import Fp8Linear
from engines.pid.quantised_linear import QuantisedLinear
from engines.pid.sampler import MODEL_TIMESTEPS, step_indices
from engines.pid.toy import TOY
from engines.pixels import to_uint8
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import Sample
from engines.size import Size

SIZE, WIDE = TOY.sizes
PRODUCT_TOLERANCE = 1e-2  # relative; some tensor cores accumulate FP8 products in fewer bits than float32 has

Check = Callable[[DeviceRuntime, FoldedDecoder], str | None]  # returns what is wrong, or None


def check_against_sampler(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that a decode equals `sample` on the same network and noise, to one level of 255."""
    request = _request(7, WIDE)
    noise = NoiseSource(7, runtime.device)
    start, *steps = [noise.draw(WIDE)[None] for _ in range(4)]
    caption = torch.zeros(1, runtime.info.caption_tokens, runtime.info.caption_width, device=runtime.device)
    with torch.inference_mode():
        conditioning = decoder.condition(request.latent[None].to(runtime.device), caption, WIDE)
        image = sample(decoder, conditioning, start, 0.0, steps)[0]
    expected = to_uint8(image).permute(1, 2, 0).cpu().numpy().astype(int)
    return _difference(_decode(runtime, request), expected, 1)


def check_repeatability(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that the same request gives the same pixels twice."""
    return _difference(_decode(runtime, _request(1)), _decode(runtime, _request(1)), 0)


def check_mixed_steps(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that images at different steps can share a batch."""
    alone = [_decode(runtime, _request(number)) for number in range(3)]
    slots = [runtime.start(_request(number)) for number in range(3)]
    remaining = [list(step_indices(4)) for _ in slots]
    for chosen in ([0], [0, 1], [0, 1, 2], [2, 1, 0], [1, 2], [2]):
        runtime.step([slots[i] for i in chosen], [remaining[i].pop(0) for i in chosen])
    problems = [_difference(_finish(runtime, slot), image, 1) for slot, image in zip(slots, alone, strict=True)]
    return next((problem for problem in problems if problem), None)


def check_pausing(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that a decode is not affected by another one that runs between its steps."""
    expected = _decode(runtime, _request(1))
    slot = runtime.start(_request(1))
    first, *rest = step_indices(4)
    runtime.step([slot], [first])
    _decode(runtime, _request(2, WIDE))
    for index in rest:
        runtime.step([slot], [index])
    return _difference(_finish(runtime, slot), expected, 0)


def check_nan(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that NaN in the latent raises DecodeError."""
    request = _request(1)
    request.latent[0, 0, 0] = float("nan")
    try:
        _decode(runtime, request)
    except DecodeError:
        return None
    return "a NaN latent produced an image instead of an error"


def check_fp8_product(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that an FP8 layer computes the product of its rounded operands.

    Passes if the device does not support FP8.
    """
    device = runtime.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return None
    return _product_error(Fp8Linear, device)


def check_fp4_product(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that an FP4 layer computes the product of its rounded operands.

    Passes if the device does not support FP4.
    """
    return _product_error(Fp4Linear, runtime.device) if has_fp4_products(runtime.device) else None


def _product_error(kind: type[QuantisedLinear], device: torch.device) -> str | None:
    x = torch.randn(3, 50, 256, device=device)  # the rows do not fill the tiles of tensor cores
    layer = kind.quantise(nn.Linear(256, 512).to(device), x.abs().max().item())
    error = relative_error(layer.multiply(x), layer.emulate(x))
    return None if error < PRODUCT_TOLERANCE else f"relative error {error:.1e}"


def check_memory(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    """Check that decodes leave no memory allocated on CUDA."""
    if runtime.device.type != "cuda":
        return None
    _decode(runtime, _request(0))
    before = torch.cuda.memory_allocated(runtime.device)
    for number in range(20):
        _decode(runtime, _request(number, WIDE if number % 2 else SIZE))
    growth = torch.cuda.memory_allocated(runtime.device) - before
    return f"20 decodes left {growth:,} bytes allocated" if growth > 0 else None


CHECKS: Mapping[str, Check] = {
    "the runtime matches the sampler": check_against_sampler,
    "the same request gives the same image": check_repeatability,
    "images at different steps share a batch": check_mixed_steps,
    "a paused image continues unchanged": check_pausing,
    "NaN in the latent raises an error": check_nan,
    "an FP8 layer multiplies its rounded operands": check_fp8_product,
    "an FP4 layer multiplies its rounded operands": check_fp4_product,
    "memory does not grow over decodes": check_memory,
}


def check_contract(config: RunConfig, checks: Mapping[str, Check] = CHECKS) -> Iterator[Finding]:
    """Run all checks of the runtime in float32, with CUDA graphs on CUDA."""
    decoder = fold(random_decoder(TOY.config, 0, config.device), MODEL_TIMESTEPS)
    runtime = make_runtime(decoder, TOY, TOY.sizes, batch=3, precision="fp32", slots=4)
    runtime.warm_up()
    for name, check in checks.items():
        problem = check(runtime, decoder)
        yield Measurement({"check": name, "result": problem or "passed"})
        if problem:
            yield Failed(f"{name}: {problem}")


def _request(number: int, size: Size = SIZE) -> Sample:
    generator = torch.Generator().manual_seed(number)
    latent = torch.randn(TOY.config.latent_channels, *TOY.config.latent_size(size), generator=generator)
    return Sample(latent, size, seed=number)


def _finish(runtime: DeviceRuntime, slot: int) -> np.ndarray:
    """Return the finished image [H, W, 3] as int and release its slot."""
    rows = runtime.finish(slot)
    try:
        rows.wait(rows.pixels.shape[0])
        return rows.pixels.astype(int)
    finally:
        rows.close()
        runtime.release(slot)


def _decode(runtime: DeviceRuntime, request: Sample) -> np.ndarray:
    slot = runtime.start(request)
    for index in step_indices(4):
        runtime.step([slot], [index])
    return _finish(runtime, slot)


def _difference(actual: np.ndarray, expected: np.ndarray, levels: int) -> str | None:
    """Describe the largest difference if it exceeds `levels`."""
    largest = int(np.abs(actual - expected).max())
    return f"off by {largest} levels of 255" if largest > levels else None
