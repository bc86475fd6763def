"""What processes and the machine did with their processor time; processes held while another one is measured."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import psutil


def tree(pid: int) -> Iterator[psutil.Process]:
    """The process and all its descendants; none once it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def busy_seconds() -> float:
    """Processor time of everybody on this machine."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "softirq", "steal")))


def hold(pid: int, held: bool) -> None:
    """Stop a process and its descendants where they are, or let them go on."""
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP if held else signal.SIGCONT)
