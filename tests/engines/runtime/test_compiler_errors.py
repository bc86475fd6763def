"""Explanations of errors that torch.compile raises on machines where it cannot work."""

from __future__ import annotations

import errno
import os
import subprocess
import sysconfig

import pytest

from engines.runtime.compiler_errors import disk_is_full, explain, failed_to_compile, lacks_compiler


def caused(by: Exception) -> Exception:
    """Return an exception as PyTorch wraps them."""
    from torch._inductor.exc import InductorError

    return InductorError(by, None)


NO_TRITON_COMPILER = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
GCC_FAILED = subprocess.CalledProcessError(1, ["gcc", "main.c"])


def test_a_missing_c_compiler_is_named():
    from torch._inductor.exc import InvalidCxxCompiler

    for error in (NO_TRITON_COMPILER, caused(NO_TRITON_COMPILER), caused(InvalidCxxCompiler())):
        assert failed_to_compile(error)
        assert "no C compiler" in explain(error)
        assert lacks_compiler(error)


def test_missing_headers_are_named(monkeypatch, tmp_path):
    assert not lacks_compiler(caused(GCC_FAILED))  # they exist here
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    for error in (GCC_FAILED, caused(GCC_FAILED)):
        assert failed_to_compile(error)
        assert f"{tmp_path}/Python.h is missing" in explain(error)
        assert lacks_compiler(error)
    assert "Python.h" not in explain(caused(ValueError("something else")))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("/usr/bin/as: cannot write main.o: No space left on device"),
    ],
)
def test_a_full_disk_is_recognised(error: Exception):
    assert disk_is_full(caused(error))
    assert "disk is full" in explain(caused(error))
    assert not lacks_compiler(caused(error))


def test_code_on_a_file_system_without_execution_is_named():
    error = ImportError("/cache/x.so: failed to map segment from shared object")
    assert failed_to_compile(error)
    assert "noexec" in explain(caused(error))


def test_any_other_error_is_quoted():
    assert explain(caused(ValueError("\n  first line.\nsecond"))) == "ValueError: first line"
    outer = RuntimeError("outer")
    outer.__cause__ = KeyError("inner")
    assert explain(outer) == "KeyError: 'inner'"


def test_errors_of_the_decoder_are_not_failures_to_compile():
    assert not failed_to_compile(RuntimeError("CUDA error: out of memory"))
    assert not failed_to_compile(ValueError("wrong shape"))
