"""Preparation of torch.compile: the directories and programs that it needs, and a replacement for a damaged cache."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from pathlib import Path

import torch

from engines.code_cache import provide_temporary_files, use_temporary_directory
from engines.errors import ConfigError
from engines.runtime.compiler_errors import NO_COMPILER, disk_is_full, missing_headers

log = logging.getLogger(__name__)


def prepare_compiler(device: torch.device, backend: object) -> None:
    """Choose the directories of torch.compile, and check that what it needs to compile exists.

    Args:
        device: Device to compile for.
        backend: Backend of torch.compile. Only "inductor" needs a C compiler, unless the code is already cached.

    Raises:
        ConfigError: A writable directory, a C compiler or Python.h is missing.
    """
    provide_temporary_files()
    if backend != "inductor" or any(map(_has_files, _directories())):
        return
    if reason := missing_headers() if _has_c_compiler(device) else NO_COMPILER:
        raise ConfigError(f"PyTorch cannot compile the decoder: {reason}.")


def replace_cache(reason: BaseException) -> None:
    """Compile in a temporary directory after `reason`; delete the cached code if it may be the cause."""
    from torch._inductor import config  # takes seconds to import, and only --compile needs it

    if disk_is_full(reason):
        use_temporary_directory("there is no space left for it")
    else:
        for directory in _directories():
            log.warning("deleting %s, because compiled code in it may be damaged: %s", directory, str(reason)[:500])
            shutil.rmtree(directory, ignore_errors=True)
        use_temporary_directory()
    provide_temporary_files()
    config.cpp_cache_precompile_headers = False  # their directory cannot be changed once PyTorch has used it
    torch.compiler.reset()


def _directories() -> list[Path]:
    return [Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]


def _has_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _has_c_compiler(device: torch.device) -> bool:
    """Search for it as Triton does for CUDA, and as Inductor does for the CPU."""
    if device.type == "cuda":
        programs = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        programs = [os.environ.get("CXX") or "g++"]
    return any(shutil.which(shlex.split(program)[0]) for program in programs)
