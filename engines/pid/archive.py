"""Reads PyTorch's zip format, the .pth files of `torch.save`, and checks every byte that is used.

`torch.load` ignores the checksums of the archive, and trusts the sizes that its pickle declares.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler  # of torch.load: creates only tensors and plain containers

_PICKLE = "data.pkl"


class ArchiveError(Exception):
    """An archive that `torch.save` does not write."""


def read_archive(path: Path) -> Any:
    """Read the object in an archive. Tensors are on the CPU and do not depend on the file afterwards.

    Raises:
        ArchiveError: The structure is invalid, or a tensor has another size than declared.
        zipfile.BadZipFile: The checksum of an entry does not match.
        pickle.UnpicklingError: The pickle contains something other than tensors and plain containers.
    """
    with _Archive.open(path) as archive:
        if archive.has("byteorder") and archive.read("byteorder") != sys.byteorder.encode():
            raise ArchiveError("it was written on a machine with another byte order")
        unpickler = Unpickler(io.BytesIO(archive.read(_PICKLE)), encoding="utf-8")
        unpickler.persistent_load = archive.storage  # type: ignore[method-assign]
        content = unpickler.load()
        archive.check_rest()
    return content


class _Archive:
    """Entries of an archive; zipfile checks the checksum of each one that is read."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file, self._unread = file, {info.filename for info in file.infolist()}
        root = next((name.removesuffix(_PICKLE) for name in self._unread if name.endswith(f"/{_PICKLE}")), None)
        if root is None:
            raise ArchiveError(f"it contains no {_PICKLE}")
        for info in file.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ArchiveError(f"{info.filename} is compressed")
        self._root, self._storages = root, dict[str, torch.UntypedStorage]()

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Archive]:
        with zipfile.ZipFile(path) as file:
            yield cls(file)

    def has(self, name: str) -> bool:
        return self._root + name in self._file.NameToInfo

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise ArchiveError(f"it contains no {name}")
        self._unread.discard(self._root + name)
        return self._file.read(self._root + name)

    def storage(self, reference: tuple[str, Any, str, str, int]) -> torch.TypedStorage:
        """Return the storage that the pickle refers to."""
        _, storage_type, key, _, count = reference
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        if key not in self._storages:
            content = bytearray(self.read(f"data/{key}"))  # writable, and freed with the storage
            empty = torch.empty(0, dtype=torch.uint8)
            tensor = torch.frombuffer(content, dtype=torch.uint8) if content else empty
            self._storages[key] = tensor.untyped_storage()
        storage = self._storages[key]
        if storage.nbytes() != count * dtype.itemsize:
            raise ArchiveError(f"data/{key} has {storage.nbytes()} bytes instead of {count * dtype.itemsize}")
        return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def check_rest(self) -> None:
        """Check the entries that were not needed, since a damaged one shows that the file is damaged."""
        for name in self._unread:
            self._file.read(name)
