"""Warm-up of a runtime: it prepares everything that requests need, and measures the cost of every stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

import torch

from engines.pid.sampler import step_indices
from engines.runtime.protocol import Runtime, RuntimeInfo, Sample
from engines.size import Size
from server.decoders import output_of
from server.dispatch import Clock, Dispatcher
from server.images.encoder import Encoder
from server.scheduling.costs import PNG_FAST, PREVIEW, CostStage, Loaded, Output, Tiling

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MEASUREMENTS = 3  # of the same work


def outputs_of(loaded: Loaded, runtime: Runtime) -> dict[Output, int]:
    """Return what the runtime of a decoder runs at once, with the maximum number of images per step.

    That is images of each size and, if it decodes larger ones, tiles of each size, one at a time.
    """
    info = runtime.info
    outputs = {Output(loaded.decoder, size, loaded.version): info.max_batch for size in info.sizes}
    tiles = outputs if info.max_pixels is not None else {}
    return outputs | {output._replace(tiling=Tiling(output.size, 1)): 1 for output in tiles}


def _tiled_outputs(loaded: Loaded, info: RuntimeInfo) -> Collection[Output]:
    """Return an image in tiles for each size that tiles have, as far as images slightly larger than a size have it."""
    smallest, cell = info.smallest_tiled_size, info.cell_side
    if smallest is None:
        return ()
    longer = [Size(height, width + cell) for height, width in info.sizes]
    longer += [Size(height + cell, width) for height, width in info.sizes]
    outputs = [output_of(loaded, size, info) for size in (smallest, *longer)]
    return {output.unit: output for output in outputs if output.tiling is not None}.values()


def measure_undisturbed(dispatcher: Dispatcher, clock: Clock, measure: Callable[[], None]) -> None:
    """Call `measure` again if a pause of the process falsified its measurements; the lowest ones count."""
    for _ in range(MAX_MEASUREMENTS):
        began = clock()
        measure()
        if not dispatcher.paused(began):
            return


class WarmUp:
    """Warms up the runtimes of decoders, on the calling thread, and enters the costs in the cost table."""

    def __init__(self, dispatcher: Dispatcher, encoder: Encoder, clock: Clock, offload: bool) -> None:
        """Create a warm-up of runtimes whose images `encoder` encodes.

        Args:
            dispatcher: Has the cost table.
            encoder: Encodes the images of the measurements.
            clock: Returns the time in seconds.
            offload: Whether to leave the weights in host memory, because those of all decoders do not stay on a device.
        """
        self._dispatcher, self._encoder, self._clock, self._offload = dispatcher, encoder, clock, offload

    def run(self, loaded: Loaded, runtime: Runtime) -> None:
        """Prepare the runtime of a decoder and measure every stage, for every size and batch.

        Raises:
            PidError: The runtime cannot be prepared.
        """
        began = self._clock()
        runtime.warm_up()
        for size in runtime.info.sizes:
            output = output_of(loaded, size, runtime.info)
            for batch in range(1, runtime.info.max_batch + 1):
                self._repeat(partial(self._measure, runtime, output, batch))
        for larger in _tiled_outputs(loaded, runtime.info):
            self._repeat(partial(self._measure, runtime, larger, 1))
        if self._offload:
            self._repeat(partial(self._measure_restore, loaded, runtime))
            runtime.offload()
        log.info("%s on %s: warm-up took %.1f s", loaded.decoder, runtime.info.device, self._clock() - began)

    def _repeat(self, measure: Callable[[], None]) -> None:
        measure_undisturbed(self._dispatcher, self._clock, measure)

    def _measure(self, runtime: Runtime, output: Output, batch: int) -> None:
        """Measure the cost of every stage."""
        latent = torch.zeros(runtime.info.latent_channels, *runtime.info.latent_size(output.size))
        start = partial(runtime.start, Sample(latent, output.size))
        slots = [self._timed("condition", output, start) for _ in range(batch)]
        for index in step_indices(2):  # the first step may select kernels; the cost table discards it
            for _ in range(output.units):
                self._timed("step", output.unit, partial(runtime.step, slots, [index] * batch), batch)
        preview = self._timed("preview", output, partial(runtime.preview, slots[0]))
        rows = self._timed("finish", output, partial(runtime.finish, slots[0]))
        for slot in slots:
            runtime.release(slot)
        self._timed("encode", output, partial(self._encoder.measure, rows), encoding=PNG_FAST)
        self._timed("encode", output, partial(self._encoder.measure_preview, preview), encoding=PREVIEW)

    def _measure_restore(self, loaded: Loaded, runtime: Runtime) -> None:
        """Measure moving the weights of one decoder out and those of another in, with the same decoder for both."""

        def move() -> None:
            runtime.offload()
            runtime.restore()

        self._timed("restore", loaded, move)

    def _timed(
        self, stage: CostStage, subject: Output | Loaded, work: Callable[[], T], batch: int = 1, encoding: str = ""
    ) -> T:
        began = self._clock()
        result = work()
        self._dispatcher.measure(stage, subject, self._clock() - began, batch, encoding)
        return result
