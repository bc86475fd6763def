"""Programs that a part starts and waits for."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence


def run_program(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """Run a program, with the output of this process and, by default, its environment.

    Returns:
        The exit status, or None if the program was stopped after `seconds`, which may be infinite.
    """
    timeout = None if seconds == math.inf else seconds
    try:
        return subprocess.run(command, timeout=timeout, env=environment, check=False).returncode  # noqa: S603
    except subprocess.TimeoutExpired:
        return None
