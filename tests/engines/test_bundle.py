"""Bundles: what was written is what is opened, and anything else is one sentence."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import engines.bundle as bundle_module
from engines.bundle import WEIGHTS, Bundle, check_output, empty_caption, load_folded, open_bundle, write_bundle
from engines.errors import BundleError
from engines.pid import PidDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from tests.tiny import TINY, manifest

CONFIG = TINY
FOLDED = fold(PidDecoder(CONFIG), MODEL_TIMESTEPS)
CAPTION = torch.randn(5, 24)
FILES: dict[str, Callable[[Path], None]] = {
    WEIGHTS: lambda path: save_file(FOLDED.state_dict(), path),
    "caption.safetensors": lambda path: save_file({"caption": CAPTION}, path),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "tiny", manifest(), FILES)


def alter(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest on disk."""
    path = bundle.path / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def sentence(path: Path) -> str:
    """The error that opening `path` ends in."""
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    text = str(caught.value)
    assert str(path) in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_round_trip(bundle: Bundle):
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert opened.manifest.network == CONFIG
    assert opened.manifest.sizes == ((64, 96), (96, 64))
    assert set(opened.manifest.files) == set(FILES)
    assert torch.equal(empty_caption(opened), CAPTION)
    assert leftovers(bundle.path.parent) == []


def test_loads_the_network_that_was_folded(bundle: Bundle):
    decoder = load_folded(bundle, "cpu", torch.float32)
    x, latent, caption = torch.randn(2, 3, 64, 96), torch.randn(2, 16, 2, 3), CAPTION.expand(2, -1, -1)
    velocities = [
        network.velocity(x, MODEL_TIMESTEPS[1], network.condition(latent, caption, (64, 96)), 0.3)
        for network in (FOLDED, decoder)
    ]
    assert torch.equal(*velocities)


def test_tables_stay_float32_in_any_precision(bundle: Bundle):
    decoder = load_folded(bundle, "cpu", torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in decoder.buffers()} == {torch.float32}


def test_one_altered_byte(bundle: Bundle):
    path = bundle.file(WEIGHTS)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    text = sentence(bundle.path)
    assert "not the file that was built" in text
    assert bundle.manifest.files[WEIGHTS].sha256 in text
    assert hashlib.sha256(content).hexdigest() in text


def test_a_file_of_another_size_or_gone(bundle: Bundle):
    path = bundle.file("caption.safetensors")
    size = path.stat().st_size
    path.write_bytes(b"short")
    assert f"has 5 bytes, but the manifest says {size:,}" in sentence(bundle.path)
    path.unlink()
    assert "lacks caption.safetensors" in sentence(bundle.path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(format_version=2), "format version 2, but this version reads 1"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.pop("sizes"), "sizes: Field required"),
        (lambda m: m["network"].pop("hidden_size"), "network: missing or unknown dimensions: hidden_size"),
        (lambda m: m["network"].update(depth=1), "network: missing or unknown dimensions: depth"),
        (lambda m: m["network"].update(num_heads=5), "network: hidden_size must be a multiple"),
        (lambda m: m["network"].update(num_heads="three"), "network.num_heads"),
        (lambda m: m["latent_space"].update(channels=4), "latent channels is 4, but the network's is 16"),
        (lambda m: m.update(upscale=8), "upscale is 8, but the network's is 4"),
        (lambda m: m.update(sizes=[[64, 65]]), "64x65 is not possible"),
        (lambda m: m.update(sizes=[]), "sizes"),
        (lambda m: m.update(times=[0.5]), "folded for the times (0.5,), but this version decodes at (0.999,"),
        (lambda m: m["empty_caption"].update(tokens=13), "13 tokens, but the network takes 12"),
        (lambda m: m.update(precision="int4"), "precision"),
        (lambda m: m["runtime"].update(kind="abacus"), "runtime.kind"),
        (lambda m: m["files"].pop(WEIGHTS), "holds no file weights.safetensors"),
        (lambda m: m["files"].update({"../x": m["files"][WEIGHTS]}), "'../x' is not a plain file name"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][WEIGHTS]}), "is not a plain file name"),
        (lambda m: m["empty_caption"].update(file="..\\x"), "is not a plain file name"),
        (lambda m: m["files"].update({"manifest.json": m["files"][WEIGHTS]}), "is not a plain file name"),
    ],
)
def test_a_manifest_that_cannot_be_trusted(bundle: Bundle, change: Callable[[dict[str, Any]], object], expected: str):
    alter(bundle, change)
    assert expected in sentence(bundle.path)


def test_folders_that_are_no_bundles(tmp_path: Path):
    assert "No bundle" in sentence(tmp_path / "missing")
    assert "there is no manifest.json" in sentence(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 1, ')
    assert "cannot be read" in sentence(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    assert "format version None" in sentence(tmp_path)


def test_weights_of_another_network(tmp_path: Path):
    files = FILES | {WEIGHTS: lambda path: save_file({"a": torch.ones(1)}, path)}
    bundle = write_bundle(tmp_path / "tiny", manifest(), files)
    with pytest.raises(BundleError, match=r"does not fit the manifest's network: missing .*unexpected a"):
        load_folded(bundle)


def crash(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "tiny", manifest(), {**FILES, "late.bin": crash})
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_replacing_keeps_the_old_bundle(bundle: Bundle):
    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle.path, manifest(decoder="new"), {**FILES, "late.bin": crash}, replace=True)
    assert open_bundle(bundle.path) == bundle
    assert leftovers(bundle.path.parent) == []


def test_a_failed_last_rename_puts_the_old_bundle_back(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    rename = bundle_module.os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in source.name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(bundle_module.os, "rename", failing)
    with pytest.raises(BundleError, match=r"could not be written: Input/output error\."):
        write_bundle(bundle.path, manifest(decoder="new"), FILES, replace=True)
    assert open_bundle(bundle.path) == bundle
    assert leftovers(bundle.path.parent) == []


def test_replaces_a_bundle_only_when_asked(bundle: Bundle):
    with pytest.raises(BundleError, match="already holds a bundle"):
        write_bundle(bundle.path, manifest(decoder="new"), FILES)
    write_bundle(bundle.path, manifest(decoder="new"), FILES, replace=True)
    assert open_bundle(bundle.path).manifest.decoder == "new"
    assert leftovers(bundle.path.parent) == []


def test_never_overwrites_what_is_not_a_bundle(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    write_bundle(photos, manifest(), FILES)  # an empty folder may be filled
    for content in ('{"name": "a web app"}', "not JSON"):
        other = tmp_path / content[:3]
        other.mkdir()
        (other / "manifest.json").write_text(content)
        with pytest.raises(BundleError, match="something other than a bundle"):
            write_bundle(other, manifest(), FILES, replace=True)
        assert (other / "manifest.json").read_text() == content
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BundleError, match="is a file"):
            check_output(path, replace=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_so(tmp_path: Path):
    def write(path: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(BundleError, match="the disk is full"):
        write_bundle(tmp_path / "tiny", manifest(), {WEIGHTS: write})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_cannot_be_made_to_contradict_itself():
    with pytest.raises(ValidationError, match="not possible"):
        manifest(sizes=((100, 100),))
    assert manifest().model_dump(mode="json")["network"] == {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(CONFIG).items()
    }
