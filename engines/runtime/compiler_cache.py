"""The directories in which torch.compile caches compiled code: damaged, full and read-only ones are not fatal."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_PROBE_BYTES = 2**20


def replace_unusable_cache() -> None:
    """Use a temporary directory in place of each one that cannot be created or has no space left."""
    for variable in _VARIABLES:
        if directory := os.environ.get(variable):
            try:
                Path(directory).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory) as file:
                    file.write(bytes(_PROBE_BYTES))
            except OSError as error:
                log.warning("compiled code cannot be cached, so every start compiles it: %s: %s", variable, error)
                os.environ[variable] = tempfile.mkdtemp(prefix="pid-compiled-")


def discard_cache(reason: BaseException) -> None:
    """Delete the cached code after `reason`, which it may have caused, and compile in temporary directories."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # only --compile needs it

    for directory in {cache_dir(), *filter(None, map(os.environ.get, _VARIABLES))}:
        log.warning("deleting %s, because compiled code in it may be damaged: %s", directory, str(reason)[:500])
        shutil.rmtree(directory, ignore_errors=True)
    for variable in _VARIABLES:
        os.environ[variable] = tempfile.mkdtemp(prefix="pid-compiled-")
    torch.compiler.reset()
