"""Bundles: opening returns exactly what was written; everything else is an error with a helpful message."""

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
from engines.manifest import MAX_MANIFEST_BYTES, content_hash
from engines.pid import PidDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.size import Size
from tests.tiny import TINY, manifest

CONFIG = TINY
FOLDED = fold(PidDecoder(CONFIG), MODEL_TIMESTEPS)
SIZE = Size(64, 96)
CAPTION = torch.randn(5, 24)
FILES: dict[str, Callable[[Path], None]] = {
    WEIGHTS: lambda path: save_file(FOLDED.state_dict(), path),
    "caption.safetensors": lambda path: save_file({"caption": CAPTION}, path),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "tiny", manifest(), FILES)


def alter(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest on disk, and its hash accordingly."""
    path = bundle.path / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps({**raw, "sha256": content_hash(raw)}))


def error_message(path: Path) -> str:
    """Open `path`, which must fail, and return the message."""
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    text = str(caught.value)
    assert str(path) in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_written_bundle_is_opened_unchanged(bundle: Bundle):
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert opened.manifest.network == CONFIG
    assert opened.manifest.sizes == (Size(64, 96), Size(96, 64))
    assert all(isinstance(size, Size) for size in opened.manifest.sizes)
    assert set(opened.manifest.files) == set(FILES)
    assert torch.equal(empty_caption(opened), CAPTION)
    assert temporary_files(bundle.path.parent) == []


def test_the_loaded_network_computes_the_same_as_the_folded_one(bundle: Bundle):
    decoder = load_folded(bundle, "cpu", torch.float32)
    x, latent, caption = torch.randn(2, 3, *SIZE), torch.randn(2, 16, 2, 3), CAPTION.expand(2, -1, -1)
    velocities = [
        network.velocity(x, MODEL_TIMESTEPS[1], network.condition(latent, caption, SIZE), 0.3)
        for network in (FOLDED, decoder)
    ]
    assert torch.equal(*velocities)


def test_tables_stay_float32_in_any_precision(bundle: Bundle):
    decoder = load_folded(bundle, "cpu", torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in decoder.buffers()} == {torch.float32}


@pytest.mark.parametrize("read", [load_folded, empty_caption])
def test_one_byte_modified_after_opening_is_an_error(bundle: Bundle, read: Callable[[Bundle], object]):
    for name in FILES:
        path = bundle.file(name)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.raises(BundleError, match="was modified or damaged") as caught:
        read(bundle)
    name = WEIGHTS if read is load_folded else "caption.safetensors"
    assert bundle.manifest.files[name].sha256 in str(caught.value)
    assert hashlib.sha256(bundle.file(name).read_bytes()).hexdigest() in str(caught.value)


@pytest.mark.parametrize("change", ["overwrite", "truncate"])
def test_a_loaded_network_does_not_depend_on_the_file(bundle: Bundle, change: str):
    decoder, caption = load_folded(bundle), empty_caption(bundle)
    before = {key: tensor.clone() for key, tensor in decoder.state_dict().items()}
    for name in FILES:
        path = bundle.file(name)
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size)) if change == "overwrite" else file.truncate(0)
    assert torch.equal(caption, CAPTION)
    for key, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_file_truncated_after_opening_is_an_error(bundle: Bundle):
    with bundle.file(WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BundleError, match="was modified or damaged"):
        load_folded(bundle)


def test_a_file_that_cannot_be_read_is_an_error(bundle: Bundle):
    path = bundle.file(WEIGHTS)
    path.unlink()
    path.mkdir()
    with pytest.raises(BundleError, match="cannot be read: Is a directory"):
        load_folded(bundle)


def test_a_truncated_or_missing_file_is_an_error(bundle: Bundle):
    path = bundle.file("caption.safetensors")
    size = path.stat().st_size
    path.write_bytes(b"short")
    assert f"has 5 bytes instead of {size:,}" in error_message(bundle.path)
    path.unlink()
    assert "caption.safetensors is missing" in error_message(bundle.path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: m.update(format_version=2),
            "format version 2; this release reads version 3. Build the bundle again: python build_engines.py "
            "--decoder tiny --target cpu --precision fp32 --output DIR.",
        ),
        (
            lambda m: m.update(format_version=2, decoder="flux-2k"),
            "--decoder flux-2k --target cpu --precision fp32 --checkpoint FILE --empty-caption FILE --output DIR.",
        ),
        (lambda m: m.update(format_version=1, decoder="x; rm", target=LONG), "--decoder NAME --target TARGET"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.pop("sizes"), "sizes: Field required"),
        (lambda m: m["network"].pop("hidden_size"), "network: missing or unknown dimensions: hidden_size"),
        (lambda m: m["network"].update(depth=1), "network: missing or unknown dimensions: depth"),
        (lambda m: m["network"].update(num_heads=5), "network: hidden_size must be a multiple"),
        (lambda m: m["network"].update(num_heads="three"), "network.num_heads"),
        (lambda m: m["latent_space"].update(channels=4), "latent_space.channels is 4, but the network requires 16"),
        (lambda m: m.update(upscale=8), "upscale is 8, but the network requires 4"),
        (lambda m: m.update(sizes=[[64, 65]]), "64x65 is not possible"),
        (lambda m: m.update(sizes=[]), "sizes"),
        (lambda m: m.update(times=[0.5]), "folded for the timesteps (0.5,), but this release uses (0.999,"),
        (lambda m: m["empty_caption"].update(tokens=13), "13 tokens, but the network supports at most 12"),
        (lambda m: m.update(precision="int4"), "precision"),
        (lambda m: m["runtime"].update(kind="abacus"), "runtime.kind"),
        (lambda m: m["files"].pop(WEIGHTS), "has no file weights.safetensors"),
        (lambda m: m["files"].update({"../x": m["files"][WEIGHTS]}), "'../x' is not a plain file name"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][WEIGHTS]}), "is not a plain file name"),
        (lambda m: m["empty_caption"].update(file="..\\x"), "is not a plain file name"),
        (lambda m: m["files"].update({"manifest.json": m["files"][WEIGHTS]}), "is not a plain file name"),
    ],
)
def test_an_invalid_manifest_is_an_error(bundle: Bundle, change: Callable[[dict[str, Any]], object], expected: str):
    alter(bundle, change)
    assert expected in error_message(bundle.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["network"].update(rope_reference=[2048, 2048]),
        lambda m: m["network"].update(adapter_padding="replicate"),
        lambda m: m["latent_space"].update(sigma_frame="variance-preserving"),
        lambda m: m.update(precision="bf16"),
        lambda m: m.update(max_batch=1),
        lambda m: m["empty_caption"].update(zeros=True),
        lambda m: m.update(warnings=["all is well"]),
        lambda m: m.pop("sha256"),
        lambda m: m.update(sha256="0" * 64),
    ],
)
def test_an_edited_field_is_an_error(bundle: Bundle, change: Callable[[dict[str, Any]], object]):
    path = bundle.path / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    assert "manifest.json was modified or damaged: the SHA-256 of its content is" in error_message(bundle.path)


def test_the_layout_of_the_manifest_may_change(bundle: Bundle):
    path = bundle.path / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(raw.items())), indent=8, ensure_ascii=True))
    assert open_bundle(bundle.path) == bundle


HUGE = 10**9
LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(
            (lambda m, field=field, value=value: m["network"].update({field: value}), f"network: {field} must be from")
            for field in asdict(CONFIG)
            if type(getattr(CONFIG, field)) is int
            for value in (HUGE, 10**4000, 0, -1)
        ),
        (lambda m: m["network"].update(rope_reference=[HUGE, 64]), "sides of rope_reference must be from 1 to 16,384"),
        (lambda m: m["network"].update(rope_reference=[0, 64]), "sides of rope_reference must be from 1 to 16,384"),
        (lambda m: m["network"].update(rope_reference=[64] * 1000), "network.rope_reference"),
        (lambda m: m.update(sizes=[[32 * HUGE, 64]]), "sides may have at most 16,384 pixels"),
        (lambda m: m.update(sizes=[[64, 96]] * 1000), "sizes: Tuple should have at most 64 items"),
        (lambda m: m.update(max_batch=HUGE), "max_batch: Input should be less than or equal to 256"),
        (lambda m: m.update(times=[0.5] * 1000), "times: Tuple should have at most"),
        (lambda m: m["verification"].update(velocity_error=[0.5] * 1000), "verification.velocity_error"),
        (lambda m: m["empty_caption"].update(tokens=HUGE), "empty_caption.tokens"),
        (lambda m: m["latent_space"].update(channels=HUGE), "latent_space.channels"),
        (lambda m: m["origin"].update(seed=2**64), "origin.seed"),
        (lambda m: m["files"][WEIGHTS].update(bytes=2**60), "bytes: Input should be less than"),
        (lambda m: m["files"].update({f"file{i}": m["files"][WEIGHTS] for i in range(2000)}), "files"),
        (lambda m: m["files"].update({LONG: m["files"][WEIGHTS]}), "files.xxx"),
        (lambda m: m["network"].update({LONG: 1}), "missing or unknown dimensions: xxx"),
        (lambda m: m.update(decoder=LONG), "decoder: String should have at most 255 characters"),
        (lambda m: m.update(licence=LONG), "licence: String should have at most 2000 characters"),
        (lambda m: m.update(warnings=["w"] * 1000), "warnings: Tuple should have at most 100 items"),
        (lambda m: m.update(format_version=LONG), "format version xxx"),
        (lambda m: m["runtime"].update(compute_capability=[HUGE, 0]), "runtime.compute_capability"),
    ],
)
def test_every_field_of_the_manifest_is_bounded(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], expected: str
):
    alter(bundle, change)
    message = error_message(bundle.path)
    assert expected in message
    assert len(message) < 2000


def test_a_directory_without_a_valid_manifest_is_not_a_bundle(tmp_path: Path):
    assert "There is no bundle at" in error_message(tmp_path / "missing")
    assert "it contains no manifest.json" in error_message(tmp_path)
    (tmp_path / "file").touch()
    assert "is a file, but a bundle is a directory" in error_message(tmp_path / "file")
    (tmp_path / "manifest.json").write_text('{"format_version": 1, ')
    assert "cannot be read" in error_message(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    assert "it is not a JSON object" in error_message(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert "cannot be read" in error_message(tmp_path)
    (tmp_path / "manifest.json").write_text(" " * (MAX_MANIFEST_BYTES + 1))
    assert "it has more than 1,048,576 bytes" in error_message(tmp_path)


def test_weights_of_a_different_network_are_an_error(tmp_path: Path):
    files = FILES | {WEIGHTS: lambda path: save_file({"a": torch.ones(1)}, path)}
    bundle = write_bundle(tmp_path / "tiny", manifest(), files)
    with pytest.raises(BundleError, match=r"does not match the network in the manifest: missing .*unexpected a"):
        load_folded(bundle)


def crash(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_a_crash_while_writing_leaves_no_files(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "tiny", manifest(), {**FILES, "late.bin": crash})
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_replacing_keeps_the_old_bundle(bundle: Bundle):
    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle.path, manifest(decoder="new"), {**FILES, "late.bin": crash}, replace=True)
    assert open_bundle(bundle.path) == bundle
    assert temporary_files(bundle.path.parent) == []


def test_a_failed_rename_restores_the_old_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    rename = bundle_module.os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in source.name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(bundle_module.os, "rename", failing)
    with pytest.raises(BundleError, match=r"could not be written: Input/output error\."):
        write_bundle(bundle.path, manifest(decoder="new"), FILES, replace=True)
    assert open_bundle(bundle.path) == bundle
    assert temporary_files(bundle.path.parent) == []


def test_a_bundle_is_replaced_only_on_request(bundle: Bundle):
    with pytest.raises(BundleError, match="already contains a bundle"):
        write_bundle(bundle.path, manifest(decoder="new"), FILES)
    write_bundle(bundle.path, manifest(decoder="new"), FILES, replace=True)
    assert open_bundle(bundle.path).manifest.decoder == "new"
    assert temporary_files(bundle.path.parent) == []


def test_a_directory_that_is_not_a_bundle_is_never_overwritten(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    write_bundle(photos, manifest(), FILES)  # an empty directory is accepted
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
def test_the_message_reports_a_full_disk(tmp_path: Path):
    def write(path: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(BundleError, match="the disk is full"):
        write_bundle(tmp_path / "tiny", manifest(), {WEIGHTS: write})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_with_contradictions_cannot_be_created():
    with pytest.raises(ValidationError, match="not possible"):
        manifest(sizes=((100, 100),))
    measured = {"layers": 1, "calibration": "", "synthetic": True, "velocity_error": 0.01, "image_psnr": 40.0}
    assert manifest(precision="fp4", quantisation={**measured, "fp4_layers": 1}).quantisation
    with pytest.raises(ValidationError, match="more layers in FP4 than layers"):
        manifest(precision="fp4", quantisation={**measured, "fp4_layers": 2})
    with pytest.raises(ValidationError, match="the precision fp4 requires quantisation results"):
        manifest(precision="fp4")
    assert manifest().model_dump(mode="json")["network"] == {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(CONFIG).items()
    }
