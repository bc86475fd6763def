"""Builds of a tiny decoder through the command line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

import build_engines
from engines.compile import build
from engines.compile.planning import plan
from engines.decoders import find_decoder
from engines.pid.released import DecoderDescription, released
from engines.size import Size
from tests.conftest import BuildOnce
from tests.engines.compile.networks import V15

TINY_DECODER = DecoderDescription("tiny", V15, released("flux-2k").latent_space, (Size(64, 64),), max_side=96)

Build = Callable[..., int]


def register_tiny_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `--decoder tiny` available, and skip the verification of its graphs, which has its own tests."""
    monkeypatch.setattr(plan, "find_decoder", lambda name: TINY_DECODER if name == "tiny" else find_decoder(name))
    monkeypatch.setattr(build, "verify_graphs", lambda *_: ())


@pytest.fixture
def build_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """Return a function that builds the tiny decoder for a target and returns the exit status."""
    register_tiny_decoder(monkeypatch)

    def run(target: str, *options: str) -> int:
        arguments = ["--decoder", "tiny", "--random-weights", "--target", target, "--output", str(tmp_path / "out")]
        return build_engines.main([*arguments, *options])

    return run


@pytest.fixture(scope="session")
def interrupted_build(build_once: BuildOnce) -> Path:
    """Directory of a build for the RTX 5090 that was interrupted before its first engine was compiled.

    It contains the workspace out.build, the exit status in `status` and the output on stderr in `stderr`.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def run(directory: Path) -> None:
        options = ["--decoder", "tiny", "--random-weights", "--precision", "bf16", "--max-batch", "2"]
        stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
            register_tiny_decoder(patch)
            patch.setattr(build, "compile_engine", interrupt)
            status = build_engines.main([*options, "--target", "rtx5090", "--output", str(directory / "out")])
        (directory / "status").write_text(str(status))
        (directory / "stderr").write_text(stderr.getvalue())

    return build_once("interrupted-build", run)
