"""Images in tiles, each tile of which is a unit that a device runs without interruption."""

from __future__ import annotations

import math

import pytest

from engines.size import Size
from server.scheduling.costs import PNG_FAST, CostTable, Output, Tiling
from server.scheduling.jobs import Job, Limits, Priority
from server.scheduling.scheduler import Scheduler

FLUX, SDXL = Output("flux", Size(2048, 2048)), Output("sdxl", Size(2048, 2048))
IMAGE = Output("flux", Size(4096, 4096), tiling=Tiling(FLUX.size, 9))
WIDE = Output("flux", Size(2048, 8192), tiling=Tiling(FLUX.size, 5))
LARGER = Output("flux", Size(4096, 8192), tiling=Tiling(FLUX.size, 17))


def scheduler() -> Scheduler:
    """Return a scheduler for one device, with batches in which further images cost nothing."""
    costs = CostTable()
    for output, step in ((FLUX, 4.0), (SDXL, 1.0)):
        for stage in ("condition", "finish"):
            costs.measure(stage, output, 0.0)
        costs.measure("encode", output, 0.0, encoding=PNG_FAST)
        for batch in range(1, 5):
            costs.measure("step", output, step, batch)
    for stage, seconds in (("condition", 0.5), ("finish", 1.0), ("preview", 2.0)):
        costs.measure(stage, IMAGE, seconds)
    costs.measure("step", IMAGE.unit, 5.0)
    costs.measure("encode", IMAGE, 4.0, encoding=PNG_FAST)
    limits = Limits(queue_seconds=1e9, prediction_margin=0, slots=4)
    return Scheduler(costs, limits, {"gpu": {FLUX: 4, SDXL: 4, IMAGE.unit: 1}})


def job(output: Output, deadline: float = math.inf, priority: Priority = Priority.STANDARD, client: str = "") -> Job:
    return Job(output, (0, 1, 2, 3), priority, deadline, client, payload=None)


def step(s: Scheduler, now: float) -> tuple[list[Job], float]:
    """Run the next step; return its batch and its end."""
    batch = s.plan("gpu", now).batch
    end = now + s.costs.step(batch[0].output, len(batch))
    s.stepped(batch, end)
    return list(batch), end


def test_all_tiles_of_all_steps_are_in_the_forecast():
    s = scheduler()
    s.admit([job(IMAGE)], 0.0)
    assert list(s.ends(0.0).values()) == [0.5 + 4 * 9 * 5.0 + 1.0 + 4.0]


def test_costs_of_other_sizes_are_derived_by_area_and_tiles():
    costs = scheduler().costs
    assert costs.image(WIDE, True, 4 * 5) == 0.5 + 4 * 5 * 5.0 + 1.0  # as many pixels, and five tiles
    assert costs.finish(LARGER) == 2.0


def test_observations_of_other_sizes_correct_the_costs():
    costs = scheduler().costs
    for number in range(60):
        costs.observe("finish", LARGER, 8.0, 0.1 * number)
    assert costs.finish(IMAGE) == pytest.approx(4.0, rel=0.05)
    assert costs.finish(FLUX) == 0.0


def test_a_tile_is_never_part_of_a_batch():
    s = scheduler()
    s.admit([job(IMAGE), job(IMAGE)], 0.0)
    s.admit([job(FLUX), job(FLUX)], 0.0)
    now = 0.0
    for _ in range(12):
        batch, now = step(s, now)
        assert len(batch) == 1 or all(one.output == FLUX for one in batch)


def test_the_steps_follow_each_other_tile_by_tile():
    s, indices, now = scheduler(), [], 0.0
    image = job(IMAGE)
    s.admit([image], now)
    while image.steps_left:
        indices.append(image.next_step)
        _, now = step(s, now)
    assert indices == [index for index in range(4) for _ in range(9)]


def test_an_urgent_image_runs_between_two_tiles():
    s = scheduler()
    image, urgent = job(IMAGE), job(SDXL, priority=Priority.INTERACTIVE, deadline=20.0)
    s.admit([image], 0.0)
    _, now = step(s, 0.0)
    s.admit([urgent], now)
    for _ in range(4):
        batch, now = step(s, now)
        assert batch == [urgent]
    assert step(s, now)[0] == [image]


def test_a_preview_follows_only_the_last_tile_of_a_step():
    s, now, image = scheduler(), 0.0, job(IMAGE)
    image.previews = True
    s.admit([image], now)
    ends = list(s.ends(now).values())
    previews = []
    while image.steps_left:
        previews.append(image.preview_follows)
        _, now = step(s, now)
    assert previews == ([False] * 8 + [True]) * 4
    s = scheduler()
    s.admit([job(IMAGE)], 0.0)
    assert ends[0] - next(iter(s.ends(0.0).values())) == 4 * 2.0
