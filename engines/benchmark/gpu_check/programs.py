"""Programs that a part starts and waits for."""

from __future__ import annotations

import math
import signal
import subprocess
from collections.abc import Mapping, Sequence

INTERRUPT_SECONDS = 5.0  # for a program to end after SIGINT, for example to write a report, before it is killed


def run_program(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """Run a program, with the output of this process and, by default, its environment.

    After `seconds`, which may be infinite, it is interrupted like a program on a terminal by Ctrl+C, and killed
    INTERRUPT_SECONDS later.

    Returns:
        The exit status, or None if the program was stopped.
    """
    with subprocess.Popen(command, env=environment) as process:  # noqa: S603
        try:
            return process.wait(None if seconds == math.inf else max(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(INTERRUPT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        return None
