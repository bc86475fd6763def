"""Bundles: directories that hold a manifest and the files it lists. Written atomically and checked when opened."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engines.errors import BundleError
from engines.manifest import MANIFEST, FileEntry, Manifest, Precision, manifest_text, read_json, read_manifest
from engines.pid.checkpoint import state_difference
from engines.pid.fold import FoldedDecoder
from engines.tensors import parse_safetensors, read_file

WEIGHTS = "weights.safetensors"  # state dictionary of the folded network
CAPTION_KEY = "caption"  # name of the tensor [T, E] in the file of the empty caption
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # layers that are not quantised
    "fp4": torch.bfloat16,  # the same
}

FileWriter = Callable[[Path], None]

# Messages of safetensors and NumPy, whose exceptions have no error number.
_DISK_FULL = re.compile(r"No space left|problem writing element|requested and \d+ written")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest and files have been checked.

    Attributes:
        path: Directory of the bundle.
        manifest: Content of its manifest.json.
    """

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            BundleError: The manifest does not list `name`.
        """
        if name not in self.manifest.files:
            raise BundleError(f"The bundle {self.path} has no file {name}.")
        return self.path / name

    def read(self, name: str) -> bytearray:
        """Read a file into memory, so that later changes of the file have no effect.

        Raises:
            BundleError: The manifest does not list `name`, or the content read does not have the SHA-256 listed.
        """
        path = self.file(name)
        try:
            content, digest = read_file(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        expected = self.manifest.files[name].sha256
        if digest != expected:
            raise BundleError(
                f"{path} was modified or damaged: its SHA-256 is {digest}, "
                f"but the manifest lists {expected}. Copy or build the bundle again."
            )
        return content


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle after checking its manifest, and the size of every file. `Bundle.read` checks the content.

    Raises:
        BundleError: The manifest is invalid, or a file is missing or has the wrong size.
    """
    path = Path(path)
    bundle = Bundle(path, read_manifest(path))
    manifest = bundle.manifest
    engines = [engine.file for engine in manifest.engines]
    for required in (manifest.empty_caption.file, *(engines or [WEIGHTS])):
        bundle.file(required)
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise BundleError(f"The bundle {path} is incomplete: {name} is missing. Copy or build it again.") from None
        except OSError as error:
            raise _unreadable(path / name, error) from error
        if size != entry.bytes:
            raise BundleError(
                f"{path / name} has {size:,} bytes instead of {entry.bytes:,}. Copy or build the bundle again."
            )
    return bundle


def load_folded(bundle: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> FoldedDecoder:
    """Load the network of a bundle onto a device.

    Args:
        bundle: A bundle with weights.
        device: Device of the returned network.
        dtype: Dtype of the parameters; by default that of the bundle's precision. The float32 tables and the FP8
            layers are never converted.

    Raises:
        BundleError: The weights cannot be read or do not match the network in the manifest.
    """
    manifest = bundle.manifest
    dtype = dtype or DTYPES[manifest.precision]
    state = {key: tensor.to(device) for key, tensor in _read_tensors(bundle, WEIGHTS).items()}
    decoder = FoldedDecoder.for_state(manifest.network, manifest.times, state)
    difference = state_difference(decoder, state)
    if difference:
        raise BundleError(f"{bundle.file(WEIGHTS)} does not match the network in the manifest: {difference}.")
    for key, _ in decoder.named_parameters():
        state[key] = state[key].to(dtype)
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def empty_caption(bundle: Bundle) -> Tensor:
    """Return the caption embedding [T, E] of requests without a caption, on the CPU, in the dtype it is stored in."""
    entry, network = bundle.manifest.empty_caption, bundle.manifest.network
    path, caption = bundle.file(entry.file), _read_tensors(bundle, entry.file).get(CAPTION_KEY)
    expected = (entry.tokens, network.caption_width)
    if caption is None or caption.shape != expected:
        found = "none" if caption is None else list(caption.shape)
        raise BundleError(f"{path} must contain a tensor {CAPTION_KEY} {list(expected)}, found {found}.")
    return caption


def write_bundle(
    path: str | Path, manifest: Manifest, files: Mapping[str, FileWriter], *, replace: bool = False
) -> Bundle:
    """Write a bundle atomically.

    The files are written and synced next to `path`, then renamed into place. After a crash `path` holds either the
    complete new bundle or its previous content.

    Args:
        path: Directory of the bundle.
        manifest: Its manifest; `files` is filled in here.
        files: One writer per file name, called with the path to write to.
        replace: Whether to replace an existing bundle.

    Raises:
        BundleError: `check_output` rejects `path`, or writing fails.
    """
    path = Path(path).resolve()
    check_output(path, replace=replace)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with writing(path):
            partial.mkdir(parents=True)
            entries = {name: _write_file(partial, path, name, write) for name, write in files.items()}
            manifest = Manifest.model_validate({**dict(manifest), "files": entries})
            _write_file(partial, path, MANIFEST, lambda file: _write_text(file, manifest_text(manifest)))
            _sync(partial)
            _move_into_place(partial, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle(path, manifest)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a `BundleError` that names `path` and the reason if the block, which writes it, fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} could not be written: {_reason(error)}.") from error


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process has left of writing a bundle, and restore the bundle that it was replacing.

    Args:
        path: Directory of the bundle, without symbolic links; no other process may be writing it.

    Raises:
        BundleError: A directory cannot be removed or renamed.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.(partial|replaced)-[0-9a-f]{{8}}")
    with writing(path):
        for folder in list(path.parent.iterdir()):
            match = leftover.fullmatch(folder.name)
            if match and match[1] == "replaced" and not path.exists():
                os.rename(folder, path)
            elif match and (match[1] == "partial" or is_bundle(path)):
                shutil.rmtree(folder)


def check_output(path: str | Path, *, replace: bool) -> None:
    """Check that a bundle may be written to `path`.

    Raises:
        BundleError: `path` is not writable, holds something other than a bundle, or holds a bundle and `replace` is
            false.
    """
    path = Path(path).resolve()
    existing = next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())
    if not existing.is_dir():
        raise BundleError(f"Cannot write a bundle to {path}: {existing} is a file.")
    if not os.access(existing if existing != path else path.parent, os.W_OK):
        raise BundleError(f"Cannot write a bundle to {path}: permission denied.")
    if existing != path or not any(path.iterdir()):
        return
    if not is_bundle(path):
        raise BundleError(
            f"{path} contains something other than a bundle and will not be overwritten; choose another path."
        )
    if not replace:
        raise BundleError(f"{path} already contains a bundle; replace it with --overwrite, or choose another path.")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(bundle: Bundle, name: str) -> dict[str, Tensor]:
    content = bundle.read(name)
    try:
        return parse_safetensors(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{bundle.file(name)} is not a valid safetensors file: {error}.") from error


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path} cannot be read: {_reason(error)}. Check its permissions and the disk.")


def _write_file(folder: Path, bundle: Path, name: str, write: FileWriter) -> FileEntry:
    """Write a file to `folder`; errors name its path in the bundle."""
    path = folder / name
    with writing(bundle / name):
        write(path)
        path.chmod(0o644)  # some writers create private files, and the server may run as another user
        _sync(path)
        return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    previous = path.with_name(f".{path.name}.replaced-{secrets.token_hex(4)}")
    try:
        os.rename(path, previous)
        os.rename(partial, path)
    except BaseException:
        if not path.exists():
            os.rename(previous, path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def is_bundle(path: Path) -> bool:
    """Return whether `path` looks like a bundle of any version, valid or not, and so may be replaced."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        raw = read_json(path / MANIFEST)
        return isinstance(raw, dict) and {"format_version", "decoder", "files"} <= raw.keys()
    return False


def _reason(error: Exception) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or _DISK_FULL.search(text):
        return "the disk is full"
    return (getattr(error, "strerror", None) or text).rstrip(".")
