"""Cache of caption embeddings in a directory, shared between processes and hosts."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engines.private_directories import create_private
from server.captions.embedding_file import PARTIAL, SUFFIX, embedding_key, file_bytes, read_embedding, write_embedding

log = logging.getLogger(__name__)

_ABANDONED_SECONDS = 86400.0  # long enough for clocks that differ between hosts
_SCAN_SHARE = 64  # a scan follows after this part of the limit was written
_SPARE_SHARE = 16  # this part of the limit is free after files were deleted
_RETRY_SECONDS = 60.0  # until the next scan, after one that failed to make room
_FAILED_DELETIONS = 8  # in a scan, after which it ends: the others are likely to fail too
_LOG_SECONDS = 600.0  # between two log messages about the same problem


class DiskCache:
    """Embeddings in files, of which the least recently used are deleted at a limit in bytes. Thread-safe.

    A file (`embedding_file`) that is damaged, or does not belong to this prompt and text encoder, is deleted and counts
    as missing. Several processes and hosts can use the same directory at the same time, also on a network file system
    and for different text encoders. Files are private to the user of the process and do not contain the prompts.

    The limit applies to all files of the directory together. It can be exceeded by about 1/64 of it for each other
    process that writes, because a process lists the directory only after it has written so much.

    If the directory cannot be used, or the disk is full, embeddings are not stored, or not found. This is logged, at
    most every ten minutes. The cache works again at most a minute after the directory does.

    All methods block for as long as the file system does, so they must not run on the event loop.

    Attributes:
        damaged: Number of files that were deleted because their content was wrong.
        failures: Number of operations of the file system that failed, such as writes to a full disk.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        identity: str,
        shape: tuple[int, int],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Use a directory in `directory` that belongs to this user, and create both if they are missing.

        Args:
            directory: Directory to share. Its private directory for this user contains the files.
            max_bytes: Limit for all files. If one embedding exceeds it, nothing is stored.
            identity: SHA-256 of all that determines an embedding, from `TextEncoderInfo`.
            shape: Tokens and width of the embeddings.
            now: Clock in seconds, for the intervals between log messages and between scans.
        """
        self.damaged = 0
        self.failures = 0
        self._parent = directory
        self._max_bytes = max_bytes
        self._identity = identity
        self._shape = shape
        self._now = now
        self._file_bytes = file_bytes(shape)
        self._counters = threading.Lock()
        self._next_log: dict[str, float] = {}
        self._space = threading.Lock()
        self._stored = -1  # bytes of all files, as far as this process knows; negative before the first scan
        self._written = 0  # bytes since the last scan
        self._reserved = 0  # bytes of files that are being written
        self._no_scan_until = -math.inf
        self._directory: Path | None = None  # None if it could not be created
        try:
            self._directory = create_private(directory)
        except OSError as error:
            self._fail("cannot use the caption cache", error)

    @property
    def bytes(self) -> int:
        """Bytes of the files of all processes, as far as this one knows; 0 until it stores its first embedding."""
        return max(self._stored, 0)

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding of `prompt`, [tokens, width] in bfloat16 on the CPU, or None if it is not stored."""
        if self._directory is None:
            return None
        key = embedding_key(self._identity, prompt)
        path = self._directory / f"{key}{SUFFIX}"
        try:
            embedding = read_embedding(path, key, self._shape)
        except OSError as error:
            if not _is_missing(error):
                self._fail("cannot read from the caption cache", error)
            return None
        if embedding is None:
            self._delete_damaged(path)
            return None
        with contextlib.suppress(OSError):  # deleted by another process, or read-only
            os.utime(path)
        return embedding

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store the embedding of `prompt`; to make room, the least recently used files are deleted.

        Args:
            prompt: Text of the prompt.
            embedding: [tokens, width], bfloat16, on the CPU.

        Raises:
            ValueError: The shape or dtype of `embedding` is wrong.
        """
        if tuple(embedding.shape) != self._shape or embedding.dtype != torch.bfloat16:
            raise ValueError(f"an embedding is bfloat16 {self._shape}, not {embedding.dtype} {tuple(embedding.shape)}")
        if (size := self._file_bytes) > self._max_bytes:
            return
        try:
            directory = self._directory = create_private(self._parent)  # it may have been deleted
            if not self._reserve(directory, size):
                return
            written = 0
            try:
                write_embedding(directory, embedding_key(self._identity, prompt), embedding)
                written = size
            finally:
                with self._space:
                    self._reserved -= size
                    self._stored += written
                    self._written += written
        except OSError as error:
            self._fail("cannot write to the caption cache", error)

    def _delete_damaged(self, path: Path) -> None:
        with self._counters:
            self.damaged += 1
        self._log("damaged", f"{path} is damaged; deleting it, so that the caption is computed again")
        self._delete(path)

    def _delete(self, path: str | Path) -> bool:
        """Delete a file; return False if that failed, but not if another process has deleted it."""
        try:
            os.unlink(path)
        except OSError as error:
            if not _is_missing(error):
                self._fail("cannot delete from the caption cache", error)
                return False
        return True

    def _reserve(self, directory: Path, size: int) -> bool:
        """Reserve `size` bytes, deleting old files if necessary. Return whether that succeeded. Raises OSError."""
        with self._space:
            if self._stored < 0 or self._written * _SCAN_SHARE > self._max_bytes or not self._fits(size):
                if self._now() < self._no_scan_until:
                    return False
                self._no_scan_until = self._now() + _RETRY_SECONDS
                self._make_room(directory, size)
                if not self._fits(size):
                    return False
                self._no_scan_until = -math.inf
            self._reserved += size
            return True

    def _fits(self, size: int, spare: int = 0) -> bool:
        return self._stored + self._reserved + size <= self._max_bytes - spare

    def _make_room(self, directory: Path, size: int) -> None:
        """List the files in `directory`, and delete the oldest if they and `size` exceed the limit. Raises OSError."""
        files = self._list(directory)
        self._stored, self._written = sum(file_size for _, file_size, _ in files), 0
        if self._fits(size):
            return
        spare, failed = self._max_bytes // _SPARE_SHARE, 0
        for _, file_size, path in sorted(files):
            if self._fits(size, spare) or failed == _FAILED_DELETIONS:
                return
            if path.endswith(PARTIAL):  # another process is writing it
                continue
            if self._delete(path):
                self._stored -= file_size
            else:
                failed += 1

    def _list(self, directory: Path) -> list[tuple[int, int, str]]:
        """Return time of the last use, bytes and path of each file; delete abandoned files. Raises OSError."""
        files = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.name.endswith((SUFFIX, PARTIAL)):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError as error:
                    if _is_missing(error):
                        continue
                    raise
                abandoned = entry.name.endswith(PARTIAL) and time.time() - status.st_mtime > _ABANDONED_SECONDS
                if not (abandoned and self._delete(entry.path)):
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        return files

    def _fail(self, action: str, error: OSError) -> None:
        with self._counters:
            self.failures += 1
        self._log(action, f"{action}: {error}")

    def _log(self, problem: str, message: str) -> None:
        """Log `message`, but not if another one about the same problem was logged recently."""
        with self._counters:
            now = self._now()
            if now < self._next_log.get(problem, -math.inf):
                return
            self._next_log[problem] = now + _LOG_SECONDS
        log.warning("%s", message)


def _is_missing(error: OSError) -> bool:
    """Return whether a file was deleted; on a network file system, ESTALE means this too."""
    return error.errno in (errno.ENOENT, errno.ESTALE)
