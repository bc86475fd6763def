"""Prompts that admitted images wait for: which ones the text encoder encodes next, and when each will be encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from server.scheduling.costs import Costs
from server.scheduling.jobs import Job, Limits


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that the text encoder encodes together, and the predicted end."""

    prompts: tuple[str, ...] = ()
    until: float = 0.0


def next_batch(waiting: Iterable[str], costs: Costs, limits: Limits) -> tuple[str, ...]:
    """Return the first of the `waiting` prompts, in order of urgency: as many as batching makes faster."""
    first = tuple(waiting)[: limits.max_prompts]
    single = costs.caption()
    count = len(first)
    while count > 1 and count * single < limits.min_batch_gain * costs.caption(count):
        count -= 1
    return first[:count]


def waiting_prompts(jobs: Iterable[Job[Any]], running: PromptBatch) -> list[str]:
    """Return the prompts of `jobs`, which are in order of rank, that the text encoder has not begun."""
    prompts = dict.fromkeys(job.prompt for job in jobs if job.prompt is not None)
    return [prompt for prompt in prompts if prompt not in running.prompts]


def encoded_at(
    now: float, jobs: Iterable[Job[Any]], running: PromptBatch, costs: Costs, limits: Limits
) -> dict[str, float]:
    """Return the predicted time at which each prompt of `jobs`, which are in order of rank, is encoded."""
    free = max(now, running.until) if running.prompts else now
    times = dict.fromkeys(running.prompts, free)
    waiting = waiting_prompts(jobs, running)
    while waiting:
        batch = next_batch(waiting, costs, limits)
        waiting = waiting[len(batch) :]
        free += costs.caption(len(batch))
        times |= dict.fromkeys(batch, free)
    return times
