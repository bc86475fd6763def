"""CPU time of processes and of the machine, and suspension of the processes that are not being measured."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import psutil


def tree(pid: int) -> Iterator[psutil.Process]:
    """Yield a process and all its descendants; nothing if it has exited."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its descendants."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def busy_seconds() -> float:
    """Return the CPU time of all processes of this machine."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "softirq", "steal")))


def suspend(pid: int) -> None:
    """Suspend a process and its descendants (SIGSTOP)."""
    _signal(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    """Resume a suspended process and its descendants (SIGCONT)."""
    _signal(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """Kill a process and its descendants."""
    _signal(pid, signal.SIGKILL)


def _signal(pid: int, signum: signal.Signals) -> None:
    for process in list(tree(pid)):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signum)


class CpuMeter:
    """CPU time since its creation: of a server, and of all processes other than the server and this one."""

    def __init__(self, pid: int) -> None:
        """Start measuring; `pid` is the server."""
        self._pid = pid
        self._server, self._own, self._busy = cpu_seconds(pid), time.process_time(), busy_seconds()
        self._began = time.perf_counter()

    def server_seconds(self) -> float:
        """Return the CPU time of the server and its descendants."""
        return cpu_seconds(self._pid) - self._server

    def other_cores(self) -> float:
        """Return the mean number of cores that other processes used."""
        ours = self.server_seconds() + time.process_time() - self._own
        return (busy_seconds() - self._busy - ours) / (time.perf_counter() - self._began)
