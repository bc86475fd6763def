"""Does it compute what it should on this device: the runtimes' contract on a toy, and the published vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engines.benchmark.decoders import make_runtime
from engines.benchmark.gpu_check import parity
from engines.benchmark.gpu_check.setting import Row, Setting
from engines.compile.load import random_decoder
from engines.errors import DecodeError
from engines.pid import FoldedDecoder, NoiseSource, fold, fp8, sample
from engines.pid.sampler import MODEL_TIMESTEPS, step_indices
from engines.pid.toy import TOY
from engines.pixels import to_uint8
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import Sample
from engines.size import Size

SIZE, WIDE = TOY.sizes
DEVICE_TOLERANCE = 5 * parity.TOLERANCE  # other kernels sum in another order
FP8_TOLERANCE = 1e-2  # relative; some tensor cores sum FP8 products in fewer bits than float32 has


def contract(setting: Setting) -> Iterator[Row]:
    """What a scheduler relies on, in float32, with the device's graphs where it has them."""
    decoder = fold(random_decoder(TOY.config, 0, setting.device), MODEL_TIMESTEPS)
    runtime = make_runtime(decoder, TOY, TOY.sizes, batch=3, precision="fp32", slots=4)
    runtime.warm_up()
    for name, check in CHECKS.items():
        problem = check(runtime, decoder)
        yield {"check": name, "result": problem or "yes"} | ({"failed": f"{name}: {problem}"} if problem else {})


def published(setting: Setting, folder: Path = parity.VECTORS) -> Iterator[Row]:
    """Relative errors against the published network's outputs; float32, without TF32."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        yield {"skipped": f"there are no vectors in {folder}; they are part of a checkout"}
        return
    torch.backends.cudnn.allow_tf32 = False
    for path in files:
        case = parity.read_case(path, setting.device)
        folded = fold(case.decoder, case.expected["t_list"][:-1].tolist())
        for form, decoder in (("live", case.decoder), ("folded", folded)):
            errors = parity.errors(case, decoder)
            row: Row = {"vector": path.stem, "network": form, **{key: f"{error:.1e}" for key, error in errors.items()}}
            if not max(errors.values()) < DEVICE_TOLERANCE:
                row["failed"] = f"{path.stem}, {form}: off by {max(errors.values()):.1e}, over {DEVICE_TOLERANCE:.0e}"
            yield row


def _request(number: int, size: Size = SIZE) -> Sample:
    height, width = (side // TOY.config.cell_side for side in size)
    generator = torch.Generator().manual_seed(number)
    return Sample(torch.randn(TOY.config.latent_channels, height, width, generator=generator), size, seed=number)


def _picture(runtime: DeviceRuntime, slot: int) -> np.ndarray:
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
    return _picture(runtime, slot)


# Each returns what is wrong, as part of a sentence, or None.


def _reference(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    request = _request(7, WIDE)
    noise = NoiseSource(7, runtime.device)
    start, *steps = [noise.draw(WIDE)[None] for _ in range(4)]
    caption = torch.zeros(1, runtime.info.caption_tokens, runtime.info.caption_width, device=runtime.device)
    with torch.inference_mode():
        conditioning = decoder.condition(request.latent[None].to(runtime.device), caption, WIDE)
        image = sample(decoder, conditioning, start, 0.0, steps)[0]
    expected = to_uint8(image).permute(1, 2, 0).cpu().numpy().astype(float)
    return _differ(_decode(runtime, request), expected, 1)


def _repeatable(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    return _differ(_decode(runtime, _request(1)), _decode(runtime, _request(1)), 0)


def _mixed_batches(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    alone = [_decode(runtime, _request(number)) for number in range(3)]
    slots = [runtime.start(_request(number)) for number in range(3)]
    plans = [list(step_indices(4)) for _ in slots]
    for chosen in ([0], [0, 1], [0, 1, 2], [2, 1, 0], [1, 2], [2]):
        runtime.step([slots[i] for i in chosen], [plans[i].pop(0) for i in chosen])
    problems = [_differ(_picture(runtime, slot), image, 1) for slot, image in zip(slots, alone, strict=True)]
    return next((problem for problem in problems if problem), None)


def _paused(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    expected = _decode(runtime, _request(1))
    slot = runtime.start(_request(1))
    first, *rest = step_indices(4)
    runtime.step([slot], [first])
    _decode(runtime, _request(2, WIDE))
    for index in rest:
        runtime.step([slot], [index])
    return _differ(_picture(runtime, slot), expected, 0)


def _not_finite(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    request = _request(1)
    request.latent[0, 0, 0] = float("nan")
    try:
        _decode(runtime, request)
    except DecodeError:
        return None
    return "a picture came of a latent that is not a number"


def _fp8_product(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    device = runtime.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return None
    x = torch.randn(3, 64, 256, device=device)
    layer = fp8.quantised(nn.Linear(256, 512).to(device), x.abs().max().item())
    weight = fp8.fp8_weight(layer.weight, layer.weight_scale)
    expected = F.linear(fp8.fp8_round(x, layer.input_scale), weight, layer.bias)
    error = ((layer.multiply(x) - expected).norm() / expected.norm()).item()
    return None if error < FP8_TOLERANCE else f"off by {error:.1e}"


def _memory(runtime: DeviceRuntime, decoder: FoldedDecoder) -> str | None:
    if runtime.device.type != "cuda":
        return None
    _decode(runtime, _request(0))
    before = torch.cuda.memory_allocated(runtime.device)
    for number in range(20):
        _decode(runtime, _request(number, WIDE if number % 2 else SIZE))
    grown = torch.cuda.memory_allocated(runtime.device) - before
    return f"20 decodes left {grown:,} bytes allocated" if grown > 0 else None


def _differ(actual: np.ndarray, expected: np.ndarray, levels: int) -> str | None:
    largest = int(np.abs(actual - expected).max())
    return f"off by {largest} levels of 255" if largest > levels else None


CHECKS: Mapping[str, Callable[[DeviceRuntime, FoldedDecoder], str | None]] = {
    "the runtime decodes what the sampler does": _reference,
    "the same request gives the same image": _repeatable,
    "images at different steps share a batch": _mixed_batches,
    "a paused image goes on where it was": _paused,
    "values that are not finite are an error": _not_finite,
    "an FP8 product is that of its rounded values": _fp8_product,
    "memory does not grow over decodes": _memory,
}
