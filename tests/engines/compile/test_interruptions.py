"""Builds that end early: signals, full disks, and what killed processes have left."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engines.bundle as bundle_module
from build_engines import main
from engines.bundle import open_bundle
from engines.compile import build as build_module
from engines.compile import weights as weights_module
from tests.engines.compile.conftest import Build

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_: object, **__: object) -> None:
    raise FULL


class FullFile(io.StringIO):
    """A text file that cannot be written."""

    def write(self, _text: str) -> int:
        raise FULL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def send(number: int) -> Callable[..., None]:
    """Return a function that sends a signal to this process."""
    return lambda *_: os.kill(os.getpid(), number)


class TestSignals:
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_a_signal_while_the_bundle_is_written_leaves_no_partial_files(
        self,
        number: int,
        status: int,
        build_tiny: Build,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        assert build_tiny("cpu") == 0
        before = open_bundle(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "write_html", send(number))
            assert build_tiny("cpu", "--overwrite", "--seed", "1") == status
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("build_engines.py: interrupted; no bundle was written. To continue the build: ")
        assert names(tmp_path) == ["out", "out.build"]
        assert open_bundle(tmp_path / "out") == before
        assert main(["--resume", str(tmp_path / "out.build")]) == 0
        assert open_bundle(tmp_path / "out").manifest.origin.seed == 1

    def test_a_signal_in_the_first_stage_leaves_no_files(
        self, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(weights_module, "save_file", send(signal.SIGTERM))
        assert build_tiny("cpu") == 143
        assert names(tmp_path) == []

    def test_a_second_signal_does_not_stop_the_clean_up(
        self, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        remove = shutil.rmtree

        def remove_after_signal(*arguments, **options) -> None:
            send(signal.SIGINT)()
            remove(*arguments, **options)

        monkeypatch.setattr(build_module, "write_html", send(signal.SIGTERM))
        monkeypatch.setattr(bundle_module.shutil, "rmtree", remove_after_signal)
        assert build_tiny("cpu") == 143
        assert names(tmp_path) == ["out.build"]

    def test_a_signal_that_a_library_swallows_ends_the_build_at_the_next_stage(
        self, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        make_weights = build_module.make_weights

        def swallow(*arguments):
            try:
                send(signal.SIGTERM)()
                signal.sigtimedwait([], 0)  # gives Python an opportunity to call the handler
            except KeyboardInterrupt:
                pass
            return make_weights(*arguments)

        monkeypatch.setattr(build_module, "make_weights", swallow)
        assert build_tiny("cpu") == 143
        assert names(tmp_path) == []

    def test_ignored_signals_stay_ignored_and_others_get_their_handlers_back(
        self, build_tiny: Build, monkeypatch: pytest.MonkeyPatch
    ):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            monkeypatch.setattr(build_module, "remove_leftovers", send(signal.SIGHUP))
            assert build_tiny("cpu") == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGHUP, before)


def full_for(kind: type, method: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Make a method of paths fail for files with this name."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(kind, method)

        def failing(self: Path, *arguments, **options):
            return fail() if self.name == name else original(self, *arguments, **options)

        monkeypatch.setattr(kind, method, failing)

    return patch


def full_on_save(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Make the weights stage fail when it writes this file, half of which is written."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        save_file = weights_module.save_file

        def failing(tensors, path: Path) -> None:
            if path.name != name:
                return save_file(tensors, path)
            path.write_bytes(b"half")
            raise FULL

        monkeypatch.setattr(weights_module, "save_file", failing)

    return patch


def full_on_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)


def full_on_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail)


def full_on_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in source.name:
            raise FULL
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)


class TestFullDisk:
    @pytest.mark.parametrize(
        ("patch", "named", "resumable"),
        [
            (full_for(Path, "mkdir", "out.build"), "out.build", False),
            (full_for(Path, "write_text", ".build.json"), "out.build/build.json", False),
            (full_for(Path, "replace", ".build.json"), "out.build/build.json", False),
            (full_on_save("weights.safetensors"), "out.build/weights.safetensors", False),
            (full_on_save("empty_caption.safetensors"), "out.build/empty_caption.safetensors", False),
            (full_on_link, "out/empty_caption.safetensors", True),
            (full_for(Path, "write_text", "report.json"), "out/report.json", True),
            (full_for(Path, "write_text", "report.html"), "out/report.html", True),
            (full_for(Path, "write_text", "manifest.json"), "out/manifest.json", True),
            (full_on_sync, "out/empty_caption.safetensors", True),
            (full_on_rename, "out", True),
        ],
    )
    def test_the_file_is_named_the_old_bundle_kept_and_the_build_resumable(
        self,
        patch: Callable[[pytest.MonkeyPatch], None],
        named: str,
        resumable: bool,
        build_tiny: Build,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        assert build_tiny("cpu") == 0
        before = open_bundle(tmp_path / "out")
        capsys.readouterr()
        with monkeypatch.context() as context:
            patch(context)
            assert build_tiny("cpu", "--overwrite", "--seed", "1") == 2
        *progress, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"build_engines.py: {tmp_path / named} could not be written: the disk is full.")
        assert all(line.startswith("[") for line in progress)
        assert open_bundle(tmp_path / "out") == before
        assert names(tmp_path) == (["out", "out.build"] if resumable else ["out"])
        if resumable:
            assert f"To continue the build: python build_engines.py --resume {tmp_path / 'out.build'}" in last
            assert main(["--resume", str(tmp_path / "out.build")]) == 0
            assert open_bundle(tmp_path / "out").manifest.origin.seed == 1

    def test_a_result_that_cannot_be_stored_does_not_count_as_complete(
        self, interrupted_build: Path, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ):
        workspace = shutil.copytree(interrupted_build / "out.build", tmp_path / "out.build")
        with monkeypatch.context() as patch:
            full_for(Path, "replace", ".build.json")(patch)
            assert main(["--resume", str(workspace)]) == 2
        assert f"{workspace}/build.json could not be written: the disk is full." in capsys.readouterr().err
        assert not (workspace / ".build.json").exists()
        assert main(["--resume", str(workspace)]) == 0

    def test_an_exported_graph_is_named(
        self, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        def save(_program: object, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise OSError("123 requested and 45 written")  # NumPy's message

        monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
        assert build_tiny("rtx5090", "--precision", "bf16") == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}/out.build/condition.onnx could not be written: the disk is full. To continue" in error

    def test_an_engine_is_named(
        self, interrupted_build: Path, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ):
        workspace = shutil.copytree(interrupted_build / "out.build", tmp_path / "out.build")
        full_for(Path, "open", "condition.engine")(monkeypatch)
        assert main(["--resume", str(workspace)]) == 2
        assert "condition.engine could not be written: the disk is full. To continue" in capsys.readouterr().err

    def test_progress_that_cannot_be_printed_does_not_end_the_build(
        self, build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """The log of a build may be a file on the disk that is full."""
        monkeypatch.setattr("sys.stderr", FullFile())
        monkeypatch.setattr("sys.stdout", FullFile())
        assert build_tiny("cpu") == 0
        assert build_tiny("cpu") == 2
        assert open_bundle(tmp_path / "out").manifest.decoder == "tiny"


class TestKilledBuilds:
    def test_partial_files_are_removed_by_the_next_build(self, build_tiny: Build, tmp_path: Path):
        for name in (".out.partial-0123abcd", ".out.replaced-0123abcd", ".other.partial-0123abcd", ".out.partial-x"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights.safetensors").touch()
        (tmp_path / "out").mkdir()
        assert build_tiny("cpu") == 0
        assert names(tmp_path) == [".other.partial-0123abcd", ".out.partial-x", ".out.replaced-0123abcd", "out"]
        assert build_tiny("cpu", "--overwrite") == 0  # the previous bundle is removed once there is a new one
        assert names(tmp_path) == [".other.partial-0123abcd", ".out.partial-x", "out"]

    def test_a_bundle_that_was_being_replaced_is_restored(self, build_tiny: Build, tmp_path: Path, capsys):
        assert build_tiny("cpu") == 0
        before = open_bundle(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / ".out.replaced-0123abcd")
        assert build_tiny("cpu", "--seed", "1") == 2
        assert "already contains a bundle" in capsys.readouterr().err
        assert open_bundle(tmp_path / "out") == before
        assert names(tmp_path) == ["out"]
