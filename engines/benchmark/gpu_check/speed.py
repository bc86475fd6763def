"""Times and memory of decodes as the server runs them: on CUDA with torch.compile and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from engines.accuracy import relative_error
from engines.benchmark.decoders import make_runtime, random_inputs, weight_bytes
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Value
from engines.benchmark.gpu_check.memory import mebibytes
from engines.benchmark.gpu_check.networks import folded_network
from engines.benchmark.gpu_check.precisions import in_both_precisions
from engines.benchmark.gpu_check.rows import Row, find_prediction, measure_row
from engines.errors import DeviceMemoryError
from engines.manifest import Precision
from engines.pid import FoldedDecoder
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size

MAX_FP8_ERROR = 0.5  # relative, of a velocity with random weights; rounding alone stays below
_LEFTOVER_MIB = 256  # reserved in addition to the weights before a row; the allocator rounds, but not by this much

Shape = tuple[Size, int]  # output size and batch


def decode_bf16(config: RunConfig) -> Iterator[Finding]:
    """Measure the main size in bf16, in batches of 1 and 2."""
    yield from _rows(config, folded_network(config), "bf16", _main_shapes(config))


def decode_fp8(config: RunConfig) -> Iterator[Finding]:
    """Measure the main size in FP8, in batches of 1 and 2, and the error of FP8 against bf16."""
    folded = folded_network(config)
    exact, before = _velocity(config, folded), weight_bytes(folded)
    del folded
    folded = folded_network(config, "fp8")
    error = relative_error(_velocity(config, folded), exact)
    del exact
    yield Note(f"weights: {mebibytes(weight_bytes(folded)):,} MiB, {mebibytes(before):,} MiB in bf16")
    yield Note(f"velocity with random weights: relative error {error:.1e} against bf16")
    if not error < MAX_FP8_ERROR:  # also true for NaN
        yield Failed(f"FP8 error {error:.1e} exceeds {MAX_FP8_ERROR:g}")
    yield from _rows(config, folded, "fp8", _main_shapes(config))


def decode_large(config: RunConfig) -> Iterator[Finding]:
    """Measure single images at the largest size."""
    yield from in_both_precisions(config, partial(_decode_single, config, config.sizes[-1]))


def decode_small(config: RunConfig) -> Iterator[Finding]:
    """Measure single images at the smallest size."""
    yield from in_both_precisions(config, partial(_decode_single, config, config.sizes[0]))


def decode_batches(config: RunConfig) -> Iterator[Finding]:
    """Measure the main size in batches of 2 and 4, in FP8 only: each smaller batch is compiled too."""
    yield from _rows(config, folded_network(config, "fp8"), "fp8", [(config.main_size, 2), (config.main_size, 4)])


def _main_shapes(config: RunConfig) -> list[Shape]:
    return [(config.main_size, 1), (config.main_size, 2)]


def _decode_single(config: RunConfig, size: Size, precision: Precision) -> Iterator[Finding]:
    yield from _rows(config, folded_network(config, precision), precision, [(size, 1)])


@torch.inference_mode()
def _velocity(config: RunConfig, folded: FoldedDecoder) -> Tensor:
    """Return the velocity [1, 3, H, W] of the first step at the smallest size; the same inputs every time."""
    size, device = config.sizes[0], config.device
    torch.manual_seed(0)
    latent, caption = random_inputs(folded.config, size, device)
    x = torch.randn(1, 3, *size, device=device)
    return folded.velocity(x, MODEL_TIMESTEPS[0], folded.condition(latent, caption, size), 0.0)


def _rows(config: RunConfig, folded: FoldedDecoder, precision: Precision, shapes: Sequence[Shape]) -> Iterator[Finding]:
    """Measure each shape with a new runtime; leave out shapes that are not expected to finish before the deadline."""
    previous: Row | None = None
    for size, batch in shapes:
        expected = 0.0 if previous is None else previous.warm_up_seconds + 2 * batch * previous.times.decode_seconds
        if previous is not None and expected > config.seconds_left:
            yield Note(f"{precision}, {size} in batches of {batch} left out: it would take about {expected:.0f} s")
            continue
        try:
            previous = measure_row(
                config,
                folded,
                lambda size=size, batch=batch: make_runtime(  # type: ignore[misc]
                    folded, config.description, (size,), batch, precision, compiled=config.on_cuda
                ),
            )
        except DeviceMemoryError:
            yield Note(f"{precision}, {size} in batches of {batch}: out of memory")
            continue
        row: dict[str, Value] = {"precision": precision, "size": str(size), "batch": batch, **previous.columns}
        yield Measurement(row)
        yield from _leftover(row)
    if previous is not None and find_prediction(config, shapes[0][0], precision) is None:
        yield Note(f"no predictions for {config.description.name} on this device")
    torch.compiler.reset()  # so that the shapes of one network do not count towards the recompile limit of the next


def _leftover(row: dict[str, Value]) -> Iterator[Finding]:
    """Report memory that an earlier row or the making of the network left behind."""
    before, weights = row.get("reserved before MiB"), row.get("weights MiB")
    if isinstance(before, int) and isinstance(weights, int) and before - weights > _LEFTOVER_MIB:
        yield Failed(f"{before - weights} MiB more than the weights were reserved before the row: its peak is too high")
