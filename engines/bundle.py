"""The bundle: a folder with a manifest and the files it names, written whole or not at all, checked before use."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import BundleError, ConfigError
from engines.manifest import FORMAT_VERSION, MANIFEST, FileEntry, Manifest, Precision
from engines.pid import fp8
from engines.pid.checkpoint import state_difference
from engines.pid.fold import FoldedDecoder

WEIGHTS = "weights.safetensors"  # the folded network's state, under its own names
CAPTION_KEY = "caption"  # the tensor [T, E] in the empty caption's file
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # of what is not quantised
}

FileWriter = Callable[[Path], None]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest and files have been checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of a file that the manifest names. Raises BundleError for any other."""
        if name not in self.manifest.files:
            raise BundleError(f"The bundle {self.path} holds no file {name}.")
        return self.path / name


def open_bundle(path: str | Path) -> Bundle:
    """Check the manifest, and every file it names by size and SHA-256. Raises BundleError on the first mismatch."""
    path = Path(path)
    bundle = Bundle(path, _read_manifest(path))
    manifest = bundle.manifest
    engines = [engine.file for engine in manifest.engines]
    for needed in (manifest.empty_caption.file, *(engines or [WEIGHTS])):
        bundle.file(needed)
    for name, entry in manifest.files.items():  # all sizes first: a file cut short is found at once
        if not (path / name).is_file():
            raise BundleError(f"The bundle {path} lacks {name}, which its manifest names.")
        size = (path / name).stat().st_size
        if size != entry.bytes:
            raise BundleError(f"{path / name} has {size:,} bytes, but the manifest says {entry.bytes:,}.")
    for name, entry in manifest.files.items():
        digest = sha256(path / name)
        if digest != entry.sha256:
            raise BundleError(
                f"{path / name} is not the file that was built: its SHA-256 is {digest}, "
                f"but the manifest says {entry.sha256}."
            )
    return bundle


def load_folded(bundle: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> FoldedDecoder:
    """The bundle's network on `device`, in its own precision or in `dtype`; tables and what is FP8 stay as they are."""
    manifest = bundle.manifest
    dtype = dtype or DTYPES[manifest.precision]
    with torch.device("meta"):
        decoder = FoldedDecoder(manifest.network, manifest.times)
    state = _load_tensors(bundle.file(WEIGHTS), str(device))
    fp8.replace_with_fp8_layers(decoder, state)
    difference = state_difference(decoder, state)
    if difference:
        raise BundleError(f"{bundle.file(WEIGHTS)} does not fit the manifest's network: {difference}.")
    for key, _ in decoder.named_parameters():
        state[key] = state[key].to(dtype)
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def empty_caption(bundle: Bundle) -> Tensor:
    """Caption tokens [T, E] for requests without a caption, on the CPU, in the dtype they were given in."""
    entry, network = bundle.manifest.empty_caption, bundle.manifest.network
    path = bundle.file(entry.file)
    caption = _load_tensors(path, "cpu").get(CAPTION_KEY)
    expected = (entry.tokens, network.caption_width)
    if caption is None or caption.shape != expected:
        found = "none" if caption is None else list(caption.shape)
        raise BundleError(f"{path} must hold a tensor {CAPTION_KEY} {list(expected)}, but holds {found}.")
    return caption


def write_bundle(
    path: str | Path, manifest: Manifest, files: Mapping[str, FileWriter], *, replace: bool = False
) -> Bundle:
    """Write a bundle by calling every writer in `files` with the path it is to fill; `manifest.files` is made here.

    All is written and synced beside `path`, then renamed into place: whatever happens, `path` holds the whole new
    bundle, or what it held before. Raises BundleError where `check_output` does, and when writing fails.
    """
    path = Path(path).resolve()
    check_output(path, replace=replace)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        entries = {name: _write_file(partial / name, write) for name, write in files.items()}
        manifest = Manifest.model_validate({**dict(manifest), "files": entries})
        _write_file(partial / MANIFEST, lambda file: _write_text(file, manifest.model_dump_json(indent=2) + "\n"))
        _sync(partial)
        _move_into_place(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"The bundle {path} could not be written: {_reason(error)}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle(path, manifest)


def check_output(path: str | Path, *, replace: bool) -> None:
    """Raise BundleError unless a bundle may be written to `path`: nothing is there, or a bundle that may go."""
    path = Path(path).resolve()
    existing = next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())
    if not existing.is_dir():
        raise BundleError(f"A bundle cannot be written to {path}: {existing} is a file.")
    if not os.access(existing if existing != path else path.parent, os.W_OK):
        raise BundleError(f"A bundle cannot be written to {path}: there is no permission to write there.")
    if existing != path or not any(path.iterdir()):
        return
    if not _is_bundle(path):
        raise BundleError(f"{path} holds something other than a bundle; it will not be overwritten.")
    if not replace:
        raise BundleError(f"{path} already holds a bundle; ask for it to be overwritten, or name another folder.")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: there is no {MANIFEST}." if path.is_dir() else f"No bundle {path}.")
    try:
        content = file.read_bytes()
        raw = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read: {error}.") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(f"{file} has format version {version}, but this version reads {FORMAT_VERSION}: rebuild it.")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        message = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{file} cannot be used: {where}{message}.") from error
    except ConfigError as error:
        raise BundleError(f"{file} cannot be used: network: {error}") from error


def _load_tensors(path: Path, device: str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error


def _write_file(path: Path, write: FileWriter) -> FileEntry:
    write(path)
    path.chmod(0o644)  # some writers make files private, and servers run as another user
    _sync(path)
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    aside = path.with_name(f".{path.name}.replaced-{secrets.token_hex(4)}")
    os.rename(path, aside)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_bundle(path: Path) -> bool:
    """Of any version, valid or not: enough that nothing else is mistaken for one and deleted."""
    with contextlib.suppress(OSError, ValueError):
        raw = json.loads((path / MANIFEST).read_bytes())
        return isinstance(raw, dict) and {"format_version", "decoder", "files"} <= raw.keys()
    return False


def _reason(error: Exception) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "the disk is full"
    return (getattr(error, "strerror", None) or text).rstrip(".")
