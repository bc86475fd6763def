"""Time of work on a CUDA device, by which kernels are chosen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

_REPEATS = 3
_SHORT_SECONDS = 1e-3  # the launch of a graph is a noticeable part of less
_COPIES = 10  # of short work in one graph

Timer = Callable[[Callable[[], object]], float]  # runs a function and returns its duration in seconds


def cuda_seconds(work: Callable[[], object]) -> float:
    """Return the shortest duration of a few runs as a CUDA graph, which is how steps run.

    `work` must have run before, because the first run of a kernel may allocate memory that a capture forbids.
    """
    seconds = _graph_seconds(work, 1)
    return seconds if seconds >= _SHORT_SECONDS else _graph_seconds(work, _COPIES) / _COPIES


def _graph_seconds(work: Callable[[], object], copies: int) -> float:
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():  # it cannot be captured
        stream = _capture_stream(stream.device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture allocates from a separate pool and cannot use cached memory
    try:
        with torch.cuda.stream(stream):
            _capture(graph, work, copies)
            return min(_replay_seconds(graph) for _ in range(_REPEATS))
    finally:
        del graph
        torch.cuda.empty_cache()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # libraries keep a workspace per stream


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], object], copies: int) -> None:
    graph.capture_begin(capture_error_mode="thread_local")  # other threads may use other devices
    try:
        for _ in range(copies):
            work()
    except BaseException:
        with suppress(RuntimeError):  # the capture may be invalid; the first error is the reason
            graph.capture_end()
        raise
    graph.capture_end()


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
