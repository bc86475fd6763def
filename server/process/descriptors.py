"""Limits on the file descriptors of the process."""

from __future__ import annotations

import os
import resource

import psutil

MAX_DESCRIPTORS = 65_536
RESERVE = 128  # descriptors for files, and for connections that are accepted only to be closed


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null if they are closed, so that no socket or file gets their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free number, which is `descriptor`


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, but at most to 65,536; return the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    goal = MAX_DESCRIPTORS if hard == unlimited else min(hard, MAX_DESCRIPTORS)
    if soft == unlimited or soft >= goal:
        return MAX_DESCRIPTORS if soft == unlimited else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
    return goal


def descriptors_in_use() -> int:
    """Return the number of open descriptors of this process."""
    count: int = psutil.Process().num_fds()
    return count
