"""Choice of implementations with given durations, or by name where no duration means anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from engines.runtime.kernels.choice import Choice, Operation, choose
from engines.runtime.kernels.timing import Timer


def timer(*seconds: float) -> Timer:
    """Return a timer that runs the work and returns these durations, one after the other."""
    durations = iter(seconds)

    def time(work: Callable[[], object]) -> float:
        work()
        return next(durations)

    return time


def choose_by_name(
    names: Sequence[str], operations: Iterable[Operation], seconds: Timer | None = None
) -> tuple[Choice, ...]:
    """Install the implementations whose names begin with one of `names`, without measuring them.

    Args:
        names: Beginnings of names, in order of preference.
        operations: The operations. One without such an implementation keeps all.
        seconds: Ignored; `choose` has such an argument.
    """

    def preferred(operation: Operation) -> Operation:
        for name in names:
            found = [(full, c) for full, c in operation.candidates.items() if full.startswith(name)]
            if found:
                return replace(operation, candidates=dict(found[:1]))
        return operation

    return choose((preferred(operation) for operation in operations), lambda work: 1.0)
