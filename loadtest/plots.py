"""One figure of a run: latency over time and its distribution, the server's queue and its batches."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loadtest.generator import Outcome, Run
from loadtest.scenario import Scenario
from loadtest.scrape import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # apart for colour-blind eyes too


def figure(scenario: Scenario, run: Run, samples: Sequence[Sample]) -> bytes:
    """The figure as PNG. Raises ImportError without matplotlib."""
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


def _whole(outcomes: Sequence[Outcome], name: str) -> list[Outcome]:
    return [o for o in outcomes if o.name == name and o.kind in ("in time", "late") and o.latency]


def _over_time(axes: Axes, outcomes: Sequence[Outcome], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        whole = _whole(outcomes, name)
        axes.plot(
            [o.at for o in whole], [o.latency or 0.0 for o in whole], ".", ms=4, alpha=0.6, color=colour, label=name
        )
    for kind, marker in (("refused", "|"), ("error", "x")):
        some = [o for o in outcomes if o.kind == kind and o.latency]
        if some:
            axes.plot([o.at for o in some], [o.latency or 0.0 for o in some], marker, ms=5, color="#777777", label=kind)
    axes.set(title="Latency from the intended send time", xlabel="sent after, s", ylabel="s", yscale="log")


def _distribution(axes: Axes, outcomes: Sequence[Outcome], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        latencies = sorted(o.latency for o in _whole(outcomes, name) if o.latency)
        if latencies:
            slower = 1 - np.arange(len(latencies)) / len(latencies)
            axes.step(latencies, slower, where="post", color=colour, label=name)
    axes.set(title="Share of answers that took at least this long", xlabel="latency, s", yscale="log")


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
    memory.set_ylabel("server's memory, MB (grey)", color="#777777")
    memory.set_ylim(bottom=0)
    axes.set(title="Batch size and memory", xlabel="s")
    axes.set_ylim(bottom=0)
