"""The command line `python -m engines.captions`."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import build_engines
from engines.bundle import empty_caption, open_bundle
from engines.captions import __main__ as command_line
from engines.captions.encoder import open_text_encoder

TOKENS = 12
PREFIX = "The cat of the red photo:\n- in "

Encode = Callable[..., int]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    (tmp_path / "prefix.txt").write_text(PREFIX)
    return tmp_path / "prefix.txt"


@pytest.fixture
def encode(tiny_text_encoder: Path, prefix: Path) -> Encode:
    def run(*options: object, directory: Path = tiny_text_encoder) -> int:
        arguments = ["--text-encoder", directory, "--prefix", prefix, "--tokens", TOKENS, *options]
        return command_line.main([str(argument) for argument in arguments])

    return run


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"captions: .*\.", last)
    return last


def test_a_caption_is_encoded(encode: Encode, tiny_text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "caption.safetensors"
    assert encode("--text", "a red cat", "--output", output) == 0
    encoder = open_text_encoder(tiny_text_encoder, PREFIX, tokens=TOKENS)
    assert load_file(output).keys() == {"caption"}
    assert torch.equal(load_file(output)["caption"], encoder.encode(["a red cat"])[0])
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "text": "a red cat",
        "text_encoder": tiny_text_encoder.name,
        "text_encoder_sha256": encoder.info.identity,
    }
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [  # and no progress bars of libraries
        f"captions: opening {tiny_text_encoder}",
        f"captions: {tiny_text_encoder.name} on cpu, prefix of {encoder.info.prefix_tokens} tokens",
        "captions: 1 of 1 captions",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"caption.safetensors", "prefix.txt"}


def test_a_doubtful_prefix_is_mentioned(
    encode: Encode, tiny_text_encoder: Path, prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prefix.write_text(PREFIX + "\n")
    output = str(tmp_path / "caption.safetensors")
    assert encode("--text", "", "--output", output) == 0
    assert "the prefix ends with a newline" in capsys.readouterr().err
    assert (
        command_line.main(["--text-encoder", str(tiny_text_encoder), "--text", "", "--output", output, "--overwrite"])
        == 0
    )
    assert "no --prefix" in capsys.readouterr().err


def test_the_builder_accepts_the_empty_caption(encode: Encode, tmp_path: Path):
    assert encode("--text", "", "--tokens", 4, "--output", tmp_path / "empty.safetensors") == 0
    options = ["--decoder", "dct-demo", "--target", "cpu", "--sizes", "64x64", "--random-weights"]
    paths = ["--empty-caption", tmp_path / "empty.safetensors", "--output", tmp_path / "out"]
    assert build_engines.main([*options, *map(str, paths)]) == 0
    bundle = open_bundle(tmp_path / "out")
    assert torch.equal(empty_caption(bundle).float(), load_file(tmp_path / "empty.safetensors")["caption"].float())
    assert not bundle.manifest.empty_caption.zeros


def test_each_line_of_a_file_is_encoded(encode: Encode, tiny_text_encoder: Path, tmp_path: Path):
    lines = ["a red cat", "", " two  spaces ", "one \u2028 line \x0b", "windows", *(["photo"] * 5)]
    ends = ["\n"] * 4 + ["\r\n"] + ["\n"] * 5
    (tmp_path / "lines.txt").write_bytes("".join(map("".join, zip(lines, ends, strict=True))).encode())
    assert encode("--lines", tmp_path / "lines.txt", "--output", tmp_path / "new" / "captions") == 0
    encoder = open_text_encoder(tiny_text_encoder, PREFIX, tokens=TOKENS)
    files = sorted((tmp_path / "new" / "captions").iterdir())
    assert [file.name for file in files] == [f"{number:02}.safetensors" for number in range(1, 11)]
    for line, file in zip(lines, files, strict=True):
        assert torch.equal(load_file(file)["caption"], encoder.encode([line])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass either --text TEXT or --lines FILE"),
        (["--text", "", "--lines", "lines.txt"], "Pass either --text TEXT or --lines FILE"),
        (["--text", "\udcff"], "The caption contains a lone surrogate"),
        (["--text", "x" * 20_001], "The caption has 20,001 characters"),
        (["--lines", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["--lines", "latin1.txt"], "latin1.txt is not UTF-8: invalid byte at offset 2"),
        (["--lines", "empty.txt"], "empty.txt has no lines"),
        (["--lines", "long.txt"], "The caption in line 2 has 20,001 characters"),
        (["--text", "", "--prefix", "missing.txt"], "The prefix missing.txt cannot be read"),
        (["--text", "", "--text-encoder", "missing"], "The text encoder missing is not a directory"),
        (["--text", "", "--device", "gpu"], "'gpu' is not a device"),
        (
            ["--text", "", "--output", "existing.safetensors"],
            "existing.safetensors exists; replace it with --overwrite",
        ),
        (["--text", "", "--output", "folder"], "folder is a directory"),
        (["--text", "", "--output", "missing/out"], "The directory missing does not exist"),
        (["--lines", "long.txt", "--output", "existing.safetensors"], "line 2"),
        (["--lines", "short.txt", "--output", "existing.safetensors"], "existing.safetensors is a file"),
        (["--lines", "short.txt", "--output", "folder"], "folder/1.safetensors exists"),
    ],
)
def test_errors_are_one_line(
    encode: Encode,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("grün\n".encode("latin-1"))
    Path("empty.txt").touch()
    Path("short.txt").write_text("red\n")
    Path("long.txt").write_text("red\n" + "x" * 20_001)
    Path("existing.safetensors").touch()
    Path("folder").mkdir()
    Path("folder/1.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    assert encode("--output", "out.safetensors", *options) == 2
    assert message in error_of(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("tokens", ["0", "many", "8193"])
def test_the_number_of_tokens_is_checked(encode: Encode, tokens: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        encode("--text", "", "--output", "out", "--tokens", tokens)
    assert "is not a number of tokens" in capsys.readouterr().err


def test_overwrite_replaces_files(encode: Encode, tmp_path: Path):
    (tmp_path / "out.safetensors").write_text("old")
    assert encode("--text", "", "--output", tmp_path / "out.safetensors", "--overwrite") == 0
    assert load_file(tmp_path / "out.safetensors")["caption"].shape == (TOKENS, 16)


def test_a_full_disk_leaves_the_previous_file(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out.safetensors").write_text("old")
    monkeypatch.setattr(command_line.os, "fsync", fail)
    assert encode("--text", "", "--output", tmp_path / "out.safetensors", "--overwrite") == 2
    assert "out.safetensors could not be written: the disk is full." in error_of(capsys)
    assert (tmp_path / "out.safetensors").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", "prefix.txt"}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 2, "out of memory")],
)
def test_an_interrupted_run_has_no_traceback(
    encode: Encode,
    error: BaseException,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "open_text_encoder", fail)
    assert encode("--text", "", "--output", tmp_path / "out.safetensors") == status
    assert message in error_of(capsys)
