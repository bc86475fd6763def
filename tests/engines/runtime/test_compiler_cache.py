"""torch.compile: its directories, what it needs to compile, and errors that it recovers from or reports."""

from __future__ import annotations

import errno
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor import config

from engines import code_cache
from engines.code_cache import choose_code_cache
from engines.errors import ConfigError
from engines.private_directories import delete_temporary
from engines.runtime import torch_runtime
from engines.runtime.compiler_cache import prepare_compiler
from engines.runtime.torch_runtime import TorchBackend
from tests.engines.runtime.runtimes import decode, make_decoder, make_sample, ready


class TestCompilerCache:
    """Damaged code in the cache, and a directory that cannot be used, only make the start slower."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            monkeypatch.delenv(variable, raising=False)
        choose_code_cache(tmp_path / "cache")
        torch.compiler.reset()
        with config.patch(cpp_cache_precompile_headers=True):  # restored afterwards
            yield Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        torch.compiler.reset()
        delete_temporary()
        choose_code_cache()

    def decode_with(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception | None]) -> np.ndarray:
        def compiler(module: torch.fx.GraphModule, inputs: object) -> Callable:
            if (raised := error()) is not None:
                raise raised
            return module.forward

        monkeypatch.setattr(torch_runtime, "COMPILE_BACKEND", compiler)
        return decode(ready(TorchBackend(make_decoder("cpu"), compiled=True)), make_sample(1))

    def test_damaged_code_is_deleted_and_compiled_again(self, monkeypatch, cache: Path, caplog):
        cache.mkdir(parents=True, exist_ok=True)
        damaged = cache / "damaged.so"
        damaged.touch()
        expected = decode(ready(TorchBackend(make_decoder("cpu"))), make_sample(1))
        image = self.decode_with(monkeypatch, lambda: OSError("file too short") if damaged.exists() else None)
        assert np.abs(image.astype(int) - expected).max() <= 1
        assert "may be damaged" in caplog.text

    def test_a_disk_that_becomes_full_keeps_the_code_and_compiles_elsewhere(self, monkeypatch, cache: Path, caplog):
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "intact.so").touch()
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.decode_with(monkeypatch, lambda: full if os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache) else None)
        assert (cache / "intact.so").exists()
        assert not config.cpp_cache_precompile_headers  # they would still be written to the full disk
        assert "every start compiles it again: there is no space left" in caplog.text

    def test_a_compiler_that_never_works_is_an_error_that_names_the_cause(self, monkeypatch):
        with pytest.raises(ConfigError, match=r"^PyTorch cannot compile the decoder: OSError: file too short\.$"):
            self.decode_with(monkeypatch, lambda: OSError("file too short"))

    def test_a_missing_compiler_is_an_error_without_another_attempt(self, monkeypatch, cache: Path, caplog):
        cache.mkdir(parents=True, exist_ok=True)
        with pytest.raises(ConfigError, match="it found no C compiler; install gcc"):
            self.decode_with(monkeypatch, lambda: RuntimeError("Failed to find C compiler."))
        assert cache.is_dir()
        assert not [record for record in caplog.records if record.name.startswith("engines")]


class TestPreparation:
    """What torch.compile needs is checked before the warm-up."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path) -> Iterator[None]:
        choose_code_cache(tmp_path / "cache")
        yield
        choose_code_cache()

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_without_a_c_compiler_it_fails_unless_code_is_cached(self, monkeypatch, device: str):
        monkeypatch.setenv("PATH", "/nonexistent")
        for variable in ("CC", "CXX"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(ConfigError, match="no C compiler"):
            prepare_compiler(torch.device(device), "inductor")
        prepare_compiler(torch.device(device), "eager")
        (Path(os.environ["TRITON_CACHE_DIR"]) / "launcher").mkdir(parents=True)
        prepare_compiler(torch.device(device), "inductor")

    @pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
    def test_variables_select_the_compiler(self, monkeypatch, device: str, variable: str):
        monkeypatch.setenv("PATH", "/nonexistent")
        monkeypatch.setenv(variable, sys.executable)
        prepare_compiler(torch.device(device), "inductor")

    def test_without_the_headers_of_python_it_fails(self, monkeypatch, tmp_path: Path):
        monkeypatch.setenv("CXX", sys.executable)
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
        with pytest.raises(ConfigError, match=r"Python\.h is missing"):
            prepare_compiler(torch.device("cpu"), "inductor")

    def test_without_a_writable_directory_it_fails(self, monkeypatch, tmp_path: Path):
        (tmp_path / "file").touch()
        monkeypatch.setattr(code_cache, "temporary_parents", lambda: [tmp_path / "missing"])
        choose_code_cache(tmp_path / "file" / "cache")
        with pytest.raises(ConfigError, match="cannot compile without a writable directory"):
            prepare_compiler(torch.device("cpu"), "inductor")
