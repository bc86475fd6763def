"""Figure of a run: latency over time, its distribution, the server's queue, and its batches and memory."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loadtest.generator import Run
from loadtest.outcome import Outcome, OutcomeKind
from loadtest.scenario import Scenario
from loadtest.scrape import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # by Okabe and Ito, for colour blindness
_GREY = "#777777"


def figure(scenario: Scenario, run: Run, samples: Sequence[Sample]) -> bytes:
    """Draw the figure and return it as PNG.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(13, 8), layout="constrained")
    over_time, distribution, queue, batches = drawing.subplots(2, 2).flat
    colours = dict(zip((kind.name for kind in scenario.mix), itertools.cycle(_COLOURS), strict=False))
    _over_time(over_time, run.outcomes, colours)
    _distribution(distribution, run.outcomes, colours)
    _queue(queue, samples)
    _batches(batches, samples)
    for axes in (over_time, distribution, queue, batches):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _over_time(axes: Axes, outcomes: Sequence[Outcome], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        _scatter(axes, [o for o in outcomes if o.name == name and o.has_image], ".", name, colour)
    _scatter(axes, [o for o in outcomes if o.expired], "+", "expired", _GREY)
    _scatter(axes, [o for o in outcomes if o.kind is OutcomeKind.REJECTED], "|", "rejected", _GREY)
    _scatter(axes, [o for o in outcomes if o.kind is OutcomeKind.ERROR], "x", "error", _GREY)
    axes.set(title="Latency from the intended send time", xlabel="sent after, s", ylabel="s", yscale="log")


def _scatter(axes: Axes, outcomes: Sequence[Outcome], marker: str, label: str, colour: str) -> None:
    points = [(outcome.at, outcome.latency) for outcome in outcomes if outcome.latency]
    if points:
        axes.plot(*zip(*points, strict=True), marker, ms=4, alpha=0.6, color=colour, label=label)


def _distribution(axes: Axes, outcomes: Sequence[Outcome], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        latencies = sorted(o.latency for o in outcomes if o.name == name and o.has_image and o.latency)
        if latencies:
            slower = 1 - np.arange(len(latencies)) / len(latencies)
            axes.step(latencies, slower, where="post", color=colour, label=name)
    axes.set(title="Share of responses with at least this latency", xlabel="latency, s", yscale="log")


def _queue(axes: Axes, samples: Sequence[Sample]) -> None:
    at = [sample.at for sample in samples]
    axes.step(at, [sample.queue_images for sample in samples], where="post", color=_COLOURS[0], label="waiting")
    axes.step(at, [sample.running_images for sample in samples], where="post", color=_COLOURS[1], label="on a device")
    axes.set(title="Images in the server", xlabel="s")


def _batches(axes: Axes, samples: Sequence[Sample]) -> None:
    at, means = [], []
    for before, after in itertools.pairwise(samples):
        if after.batch_count > before.batch_count:
            at.append(after.at)
            means.append((after.batch_sum - before.batch_sum) / (after.batch_count - before.batch_count))
    axes.plot(at, means, color=_COLOURS[0], label="images per step")
    memory = axes.twinx()
    memory.plot(
        [sample.at for sample in samples], [sample.memory_bytes / 1e6 for sample in samples], color="#999999", lw=1
    )
    memory.set_ylabel("server memory, MB (grey)", color=_GREY)
    memory.set_ylim(bottom=0)
    axes.set(title="Batch size and memory", xlabel="s")
    axes.set_ylim(bottom=0)
