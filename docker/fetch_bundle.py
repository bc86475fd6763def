"""Fetches a bundle: `python fetch_bundle.py URL SHA256 DIR`, for example in an init container.

Downloads a tar archive, which may be compressed with gzip, checks its SHA-256, and unpacks the bundle in it to DIR. If
DIR has the bundle of this archive, it does nothing. It uses only the standard library, so that it starts fast.

Exit status: 0 if DIR has the bundle, 1 after an error of the network or the HTTP server, 2 after any other error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

TOKEN = "PID_FETCH_TOKEN"  # noqa: S105  name of the environment variable
MARKER = ".archive-sha256"  # file in a fetched bundle with the hash of its archive
MANIFEST = "manifest.json"

ATTEMPTS = 6  # in succession that download nothing more, with pauses of 1, 2, 4, … seconds between them
TIMEOUT_SECONDS = 60  # for a connection, and for each read
CHUNK_BYTES = 1 << 20
RESERVE_BYTES = 64 << 20  # of the disk, which remain free
RETRIED_STATUSES = {408, 416, 425, 429, *range(500, 600)}  # 416: the rest was requested of a part that is too long

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # what a manifest can list


class FetchError(Exception):
    """The bundle could not be fetched. `retryable`: a later attempt may succeed."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class InterruptedTransferError(Exception):
    """An attempt to download failed. `restart`: the next one must not continue it."""

    def __init__(self, message: str, *, restart: bool = False) -> None:
        super().__init__(message)
        self.restart = restart


@dataclass(frozen=True)
class Source:
    """Address of an archive, its SHA-256 in lower-case hexadecimal, and a bearer token for the host of the address."""

    url: str
    sha256: str
    token: str = ""

    def __str__(self) -> str:
        return self.url.partition("?")[0]  # the query may contain a signature

    def check(self) -> None:
        """Raise a `FetchError` if the address, the hash or the token cannot be used."""
        if not re.fullmatch(r"https?://[\w.-]+(:[0-9]{1,5})?(/[\x21-\x7e]*)?", self.url, re.ASCII):
            rule = "without a user name, and with %20 for spaces"
            raise FetchError(f"URL must have the form https://HOST/PATH or http://HOST/PATH, {rule}.")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise FetchError("SHA256 must be 64 hexadecimal digits, as sha256sum prints them.")
        if self.token and not self.url.startswith("https:"):
            raise FetchError(f"{TOKEN} is sent only over https, but the URL begins with http; use https, or no token.")
        if not re.fullmatch(r"[\x21-\x7e]*", self.token):
            raise FetchError(f"{TOKEN} must consist of ASCII characters without spaces.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; sends the token only to the host that it is for, and never continues without TLS."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        """Return the next request; the last argument is its address."""
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(args[-1])
        if new.scheme not in ("https", old.scheme):
            raise FetchError(f"{req.full_url.partition('?')[0]} redirects to an address without TLS.")
        request = super().redirect_request(req, *args)
        if request is not None and (new.scheme, new.netloc) == (old.scheme, old.netloc):
            request.unredirected_hdrs.update(req.unredirected_hdrs)
        return request


def fetch(
    source: Source,
    folder: Path,
    pause: Callable[[float], object] = time.sleep,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> bool:
    """Fetch a bundle, unless it was fetched before. Only one process at a time fetches to `folder`; others wait.

    Args:
        source: The archive.
        folder: Directory of the bundle. A bundle that was fetched from another archive is replaced.
        pause: Waits for a number of seconds.
        free_bytes: Returns the free space of the file system of a directory.

    Returns:
        Whether the archive was fetched now.

    Raises:
        FetchError: The bundle could not be fetched. If it is retryable, the part that was downloaded remains on the
            disk, and the next call continues it; otherwise nothing remains.
    """
    source.check()
    folder = Path(os.path.abspath(folder))
    work = folder.parent / f".{folder.name}.fetch"
    with _disk_errors(folder), _lock(folder.parent / f".{folder.name}.fetch-lock"):
        if _fetched_hash(folder) == source.sha256:
            shutil.rmtree(work, ignore_errors=True)
            return False
        _check_replaceable(folder)
        work.mkdir(exist_ok=True)
        for leftover in work.iterdir():  # of a process that was killed; a part of this archive is continued
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != source.sha256:
                leftover.unlink()
        try:
            archive = work / source.sha256
            _download_with_retries(source, archive, pause, free_bytes)
            _unpack(archive, work / "bundle", lambda: free_bytes(work))
            (work / "bundle" / MARKER).write_text(f"{source.sha256}\n")
            _move_into_place(work / "bundle", folder, work / "replaced")
        except (FetchError, OSError) as error:
            if not (isinstance(error, FetchError) and error.retryable):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)
        return True


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system in the block into a `FetchError`."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder} cannot be written: {error.strerror}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem += f"; mount a volume at {folder.parent} that user {os.getuid()} can write to"
        raise FetchError(f"{problem}.") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock, which the kernel releases when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = False
    while not held:
        with path.open("ab") as file:  # for writing: NFS locks no other files
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # the previous holder has deleted this file: lock the new one
                held = os.path.samestat(os.fstat(file.fileno()), path.stat())
            if held:
                try:
                    yield
                finally:
                    path.unlink()  # while it is locked, so that it is not the file of a later process


def _fetched_hash(folder: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeError):
        return (folder / MARKER).read_text().strip()
    return None


def _check_replaceable(folder: Path) -> None:
    """Raise a `FetchError` unless `folder` is missing, empty, or a bundle that was fetched."""
    if folder.is_symlink() or os.path.ismount(folder) or (folder.exists() and not folder.is_dir()):
        raise FetchError(f"{folder} is a mount point or not a directory, and cannot be replaced; choose another path.")
    if folder.exists() and any(folder.iterdir()) and _fetched_hash(folder) is None:
        raise FetchError(f"{folder} contains files that were not fetched; remove them, or choose another directory.")


def _download_with_retries(
    source: Source, archive: Path, pause: Callable[[float], object], free_bytes: Callable[[Path], int]
) -> None:
    """Download the archive. After a failed attempt the next one continues where it ended, if the server can do that."""
    failures, longest = 0, 0
    while True:
        with archive.open("a+b") as part:
            part.seek(0)
            digest, start = hashlib.file_digest(part, "sha256"), part.tell()
        try:
            if start == 0 or digest.hexdigest() != source.sha256:
                digest, start = _download(source, archive, digest, start, free_bytes)
            if digest.hexdigest() == source.sha256:
                return
            if start == 0:
                found = f"it is {digest.hexdigest()} instead of {source.sha256}"
                raise FetchError(f"{source} has the wrong SHA-256: {found}. Correct the hash or the URL.")
            raise InterruptedTransferError("the continued download has the wrong SHA-256", restart=True)
        except InterruptedTransferError as error:
            if error.restart:
                os.truncate(archive, 0)
            size = archive.stat().st_size
            failures, longest = (1, size) if size > longest else (failures + 1, longest)
            print(f"{source}: {error}; {size:,} bytes downloaded; attempt {failures} of {ATTEMPTS}", flush=True)
            if failures == ATTEMPTS:
                raise FetchError(f"{source} could not be downloaded: {error}.", retryable=True) from error
        pause(2.0 ** (failures - 1))


def _download(
    source: Source, archive: Path, digest: Any, start: int, free_bytes: Callable[[Path], int]
) -> tuple[Any, int]:
    """Download the archive from byte `start`, or all of it if the server does not support that.

    Return the hash object of the whole archive, and the byte at which the download began.
    """
    with _open(source, start) as response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise InterruptedTransferError("the server sent another range than requested", restart=True)
        if start and response.status != 206:  # the whole archive
            digest, start = hashlib.sha256(), 0
            os.truncate(archive, 0)
        missing = response.length  # None if the server does not announce the length
        room, received = free_bytes(archive.parent) - RESERVE_BYTES, 0
        with archive.open("ab") as file:
            while received != missing and (chunk := _read(response)):
                received += len(chunk)
                if max(received, missing or 0) > room:
                    raise FetchError(f"The archive is larger than the free space of {archive.parent.parent}.")
                digest.update(chunk)
                file.write(chunk)
        if missing is not None and received < missing:
            raise InterruptedTransferError(f"the connection ended {missing - received:,} bytes too early")
        if missing is None and "Transfer-Encoding" not in response.headers and digest.hexdigest() != source.sha256:
            problem = "the SHA-256 is wrong; the download may be incomplete, as the server announces no length"
            raise InterruptedTransferError(problem)
        return digest, start


def _open(source: Source, start: int) -> http.client.HTTPResponse:
    request = urllib.request.Request(source.url)  # noqa: S310  the scheme was checked
    if source.token:
        request.add_unredirected_header("Authorization", f"Bearer {source.token}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_Redirects)
    try:
        return cast(http.client.HTTPResponse, opener.open(request, timeout=TIMEOUT_SECONDS))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in RETRIED_STATUSES:
            message = f"the server responds with status {error.code}"
            raise InterruptedTransferError(message, restart=error.code == 416) from None
        hint = f"; check {TOKEN}" if error.code in (401, 403) else ""
        raise FetchError(f"{source}: the server responds with status {error.code}{hint}.") from None
    except urllib.error.URLError as error:
        raise InterruptedTransferError(f"no connection: {error.reason}") from error
    except (ValueError, http.client.InvalidURL) as error:  # its message may contain a password or a signature
        raise FetchError(f"{source}: the URL, or an address that the server redirects to, is invalid.") from error
    except (OSError, http.client.HTTPException) as error:
        raise InterruptedTransferError(f"no valid response: {error!r}") from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)  # what has arrived, so that a failure loses none of it
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the size of a chunk
        raise InterruptedTransferError(f"the connection failed: {error!r}") from error


def _unpack(path: Path, bundle: Path, free_bytes: Callable[[], int]) -> None:
    """Unpack the files of a bundle, which are at the root of the archive or in a single directory.

    Only plain files with plain names are accepted, so that nothing outside of `bundle` can be written.
    """
    with path.open("rb") as file:
        mode: Any = "r:gz" if file.read(2) == b"\x1f\x8b" else "r:"
    bundle.mkdir()
    parents, names = set(), set()
    try:
        with tarfile.open(path, mode) as archive:
            for member in archive:
                *parent, name = PurePosixPath(member.name).parts or ("",)
                if member.isdir() and not parent and name not in ("/", ".."):
                    continue
                parents.add(tuple(parent))
                outside = len(parent) > 1 or parent in (["/"], [".."]) or len(parents) > 1
                if not member.isreg() or outside or not _FILE_NAME.fullmatch(name) or name in names:
                    rule = "plain files at the root or in a single directory, each name once"
                    if name.startswith("._"):
                        rule += "; create it with COPYFILE_DISABLE=1 on macOS, where tar adds such files"
                    raise FetchError(f"The archive contains {member.name!r:.200}, but a bundle consists of {rule}.")
                names.add(name)
                if member.size > free_bytes() - RESERVE_BYTES:
                    raise FetchError(f"{name} is larger than the free space of {bundle.parent.parent}.")
                with (bundle / name).open("xb") as output:
                    shutil.copyfileobj(cast(IO[bytes], archive.extractfile(member)), output, CHUNK_BYTES)
                    output.flush()
                    os.fsync(output.fileno())
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FetchError(f"The archive is not a valid tar file, compressed with gzip or not: {error}.") from error
    if MANIFEST not in names:
        raise FetchError(f"The archive contains no {MANIFEST}; create it from the directory of a bundle.")


def _move_into_place(new: Path, folder: Path, previous: Path) -> None:
    if folder.exists():
        folder.rename(previous)
    try:
        new.rename(folder)
    except BaseException:
        if previous.exists():
            previous.rename(folder)
        raise


def main(arguments: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit status."""
    # An init container is process 1, which without a handler ignores SIGTERM. The next run continues the download.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if len(arguments) != 3 or not all(arguments):
            raise FetchError("Usage: python fetch_bundle.py URL SHA256 DIR")
        url, sha256, folder = arguments
        fetched = fetch(Source(url, sha256.lower(), os.environ.get(TOKEN, "")), Path(folder))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1 if error.retryable else 2
    print(f"{folder}: {'the bundle was fetched' if fetched else 'the bundle was fetched before'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
