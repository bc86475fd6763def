"""The directory of compiled code: where it is, what replaces it, and what is deleted from it."""

from __future__ import annotations

import getpass
import os
import pwd
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import code_cache as module
from engines.code_cache import (
    choose_code_cache,
    code_cache,
    default_directory,
    provide_temporary_files,
    use_temporary_directory,
)
from engines.errors import ConfigError
from engines.private_directories import delete_temporary

COMPILERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "CUDA_CACHE_PATH")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*COMPILERS, "TMPDIR"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    delete_temporary()
    monkeypatch.undo()
    choose_code_cache()


class TestChoice:
    def test_all_compilers_use_the_chosen_directory(self, tmp_path: Path, caplog):
        cache = choose_code_cache(tmp_path)
        assert cache.directory == tmp_path / f"uid-{os.geteuid()}"
        assert code_cache() is cache
        for name in COMPILERS:
            assert Path(os.environ[name]).is_relative_to(cache.directory)
        assert cache.folder("tensorrt-rtx") == cache.directory / "tensorrt-rtx"
        assert not caplog.records

    def test_it_comes_from_the_variables_or_the_home_directory(self, monkeypatch):
        assert default_directory({"PID_CACHE_DIR": "/cache", "XDG_CACHE_HOME": "/xdg"}) == Path("/cache")
        assert default_directory({"PID_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/pid-server")
        monkeypatch.setenv("HOME", "/home/me")
        assert default_directory({"XDG_CACHE_HOME": "relative"}) == Path("/home/me/.cache/pid-server")

    def test_variables_of_a_compiler_are_ignored_with_a_warning(self, tmp_path: Path, monkeypatch, caplog):
        monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
        cache = choose_code_cache(tmp_path)
        assert cache.directory is not None
        assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(cache.directory)
        (record,) = caplog.records
        assert "ignored: TRITON_CACHE_DIR" in record.getMessage()

    def test_a_second_choice_replaces_the_first_without_a_warning(self, tmp_path: Path, caplog):
        choose_code_cache(tmp_path / "first")
        cache = choose_code_cache(tmp_path / "second")
        assert code_cache() is cache
        assert str(tmp_path / "second") in os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert not caplog.records


class TestFallback:
    def test_an_unusable_directory_is_replaced_by_a_temporary_one_with_one_warning(self, tmp_path: Path, caplog):
        (tmp_path / "file").touch()
        cache = choose_code_cache(tmp_path / "file" / "cache")
        assert cache.directory is not None
        assert cache.directory.is_dir()
        (record,) = caplog.records
        assert "every start compiles it again" in record.getMessage()
        assert "Not a directory" in record.getMessage()
        assert "set --cache-dir (or PID_CACHE_DIR)" in record.getMessage()
        delete_temporary()
        assert not cache.directory.exists()

    def test_a_user_without_a_home_directory_gets_a_temporary_one(self, monkeypatch, caplog):
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.delenv("PID_CACHE_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert choose_code_cache().directory is not None
        assert f"uid {os.getuid()} has no home directory" in caplog.text

    def test_without_any_writable_directory_only_what_needs_one_fails(self, tmp_path: Path, monkeypatch, caplog):
        (tmp_path / "file").touch()
        monkeypatch.setattr(module, "temporary_parents", lambda: [tmp_path / "missing"])
        cache = choose_code_cache(tmp_path / "file" / "cache")
        assert cache.directory is None
        assert cache.folder("tensorrt-rtx") is None
        assert len(caplog.records) == 1
        with pytest.raises(ConfigError, match=r"--cache-dir .* Not usable are .*Not a directory; .*missing: No such"):
            cache.require()

    def test_a_directory_that_becomes_full_is_replaced_by_one_elsewhere(self, tmp_path: Path, monkeypatch, caplog):
        (tmp_path / "scratch").mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
        choose_code_cache(tmp_path / "cache")
        provide_temporary_files()  # in the cache
        use_temporary_directory("there is no space left for it")
        assert "every start compiles it again: there is no space left" in caplog.text
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tmp_path / "scratch")


class TestTemporaryFiles:
    def test_they_are_in_the_directory_of_compiled_code(self, tmp_path: Path):
        """PyTorch keeps precompiled headers in a directory for temporary files, under a name that others can guess."""
        cache = choose_code_cache(tmp_path)
        provide_temporary_files()
        assert cache.directory is not None
        assert Path(tempfile.gettempdir()).is_relative_to(cache.directory)
        assert os.environ["TMPDIR"] == tempfile.gettempdir()

    def test_a_user_without_a_name_gets_one(self, tmp_path: Path, monkeypatch):
        def unknown(uid: int) -> None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        for name in ("USER", "LNAME", "USERNAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LOGNAME", "")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        choose_code_cache(tmp_path)
        provide_temporary_files()
        assert getpass.getuser() == f"uid-{os.geteuid()}"

    def test_without_a_directory_there_are_none(self, tmp_path: Path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setattr(module, "temporary_parents", lambda: [tmp_path / "missing"])
        choose_code_cache(tmp_path / "file" / "cache")
        with pytest.raises(ConfigError, match="without a writable directory"):
            provide_temporary_files()


def test_code_that_was_not_used_for_long_is_deleted(tmp_path: Path):
    directory = choose_code_cache(tmp_path).directory
    assert directory is not None
    (current,) = directory.glob("pid-*")
    other_version, kernels, cuda = directory / "pid-0.0.1-torch-1.0", directory / "tensorrt-rtx", directory / "cuda"
    for folder in (other_version, kernels):
        folder.mkdir()
    leftover = current / "tmp" / "leftover"
    leftover.mkdir(parents=True)
    old, partial, recent = (kernels / name for name in ("old.kernels", ".old.kernels.partial", "recent.kernels"))
    for file in (old, partial, recent):
        file.touch()
    long_ago = time.time() - 100 * 86400
    for path in (current, leftover, other_version, old, partial, cuda):
        os.utime(path, (long_ago, long_ago))
    choose_code_cache(tmp_path)
    assert sorted(directory.iterdir()) == sorted([current, kernels, cuda])  # CUDA limits its own cache
    assert list(kernels.iterdir()) == [recent]
    assert not leftover.exists()
