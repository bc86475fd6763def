"""Recognition and explanation of the errors that torch.compile raises if it cannot work on a machine."""

from __future__ import annotations

import errno
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NO_COMPILER = "it found no C compiler; install gcc and g++, or set CC and CXX to their paths"
_COMPILERS = ("torch._dynamo", "torch._inductor", "triton")  # modules of their exceptions
_MESSAGES = {
    re.compile(r"Failed to find C compiler|No working C\+\+ compiler"): NO_COMPILER,
    re.compile(r"failed to map segment"): "files in its cache cannot be executed; do not mount it with noexec",
}


def failed_to_compile(error: Exception) -> bool:
    """Return whether an exception of a compiled function may come from its compilation."""
    # Compared by name: importing the compiler for its exception types takes seconds, and most starts do not use it.
    module = type(error).__module__
    return (
        isinstance(error, OSError | subprocess.SubprocessError)
        or module.startswith(_COMPILERS)
        or any(pattern.search(str(error)) for pattern in _MESSAGES)
    )


def reached_recompile_limit(error: Exception) -> bool:
    """Return whether a compiled function has been compiled for as many inputs as PyTorch is set to allow."""
    return type(error).__name__ == "FailOnRecompileLimitHit"


def explain(error: BaseException) -> str:
    """Return the reason why torch.compile failed, and what to do if that is known, without a full stop."""
    text = "\n".join(str(each) for each in _chain(error))
    for pattern, explanation in _MESSAGES.items():
        if pattern.search(text):
            return explanation
    if disk_is_full(error):
        return "the disk is full; free some space, or use another directory for --cache-dir and TMPDIR"
    if _compiler_failed(error) and (headers := missing_headers()):
        return headers
    *_, cause = _chain(error)
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason was given")
    return f"{type(cause).__name__}: {first[:300].rstrip('.')}"


def lacks_compiler(error: BaseException) -> bool:
    """Return whether there is no C compiler, or no headers of Python, so that another attempt would fail too."""
    return explain(error) == NO_COMPILER or (_compiler_failed(error) and bool(missing_headers()))


def disk_is_full(error: BaseException) -> bool:
    """Return whether an exception was caused by a full disk."""
    return any(
        (isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(each)
        for each in _chain(error)
    )


def missing_headers() -> str:
    """Return an explanation if Python.h, which compiled code includes, is missing; else an empty text."""
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    return "" if header.exists() else f"{header} is missing; install the package with Python's headers (python3-dev)"


def _compiler_failed(error: BaseException) -> bool:
    return any(isinstance(each, subprocess.CalledProcessError) or "Python.h" in str(each) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, the original one last."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = getattr(current, "inner_exception", None) or current.__cause__ or current.__context__
