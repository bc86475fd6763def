"""The compiled kernels of the PNG encoder: deflate, Adler-32, and how numba compiles and caches them."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import pytest

from engines import code_cache
from engines.code_cache import choose_code_cache
from engines.private_directories import delete_temporary
from server.images import numba_kernel, png_deflate, png_filters


def test_deflate_blocks_stay_small_enough_for_fflate():
    """fflate 0.8 misreads more than 128 KiB of literals in one block, so the block header has to be repeated."""
    data = np.random.default_rng(0).geometric(0.2, 500_000).astype(np.uint8)
    packed = deflate(data)
    assert inflate(packed) == data.tobytes()
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").tobytes()
    assert bits.count(bits[:150]) == len(data) / png_deflate.BLOCK_BYTES


def deflate(data: np.ndarray) -> bytes:
    words = np.empty(len(data) // 8 + 10, np.uint64)
    runs, pairs = np.empty((len(data) // 16 + 1, 2), np.int64), np.empty(65_536, np.uint32)
    return words.view(np.uint8)[: png_deflate.deflate(data, runs, pairs, words)].tobytes()


def inflate(data: bytes) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data)


@pytest.mark.parametrize("length", [*range(16, 40), 255, 256, 257, 258, 259, 260, 261, 515, 516, 517, 518, 776, 5000])
@pytest.mark.parametrize("before", range(1, 9))
def test_runs_of_zeros_of_any_length_and_position_are_preserved(length, before):
    data = np.array([1, 2, 3, 1, 2, 3, 1, 2][:before] + [0] * length + [9] * 200, np.uint8)
    assert inflate(deflate(data)) == data.tobytes()


FIBONACCI = [1, 1]
while len(FIBONACCI) < 40:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


@pytest.mark.parametrize("limit", [7, 12])
@pytest.mark.parametrize(
    "counts",
    [[5], [0, 5, 0], [5, 9], [1, 1, 1], FIBONACCI[:19], [2**i for i in range(19)], [1] * 100, [10**6] + [1] * 99],
    ids=["one", "one of three", "two", "three", "Fibonacci", "powers", "equal", "one of many"],
)
def test_code_lengths_are_within_the_limit_and_complete(counts, limit):
    lengths = png_deflate.code_lengths(np.array(counts, np.int64), limit)
    assert ((lengths > 0) == (np.array(counts) > 0)).all()
    assert lengths.max() <= limit
    kraft = sum(2.0 ** -int(length) for length in lengths if length)
    assert kraft == (1 if np.count_nonzero(counts) > 1 else 0.5)
    order = np.argsort(counts, kind="stable")
    used = [int(lengths[i]) for i in order if counts[i]]
    assert used == sorted(used, reverse=True)


def test_code_lengths_are_optimal_if_the_limit_is_not_reached():
    lengths = png_deflate.code_lengths(np.array([1, 1, 2, 4, 8, 16], np.int64), 12)
    assert lengths.tolist() == [5, 5, 4, 3, 2, 1]


def test_bytes_whose_optimal_codes_exceed_twelve_bits_are_preserved():
    data = np.repeat(np.arange(1, 27, dtype=np.uint8), FIBONACCI[:26])
    np.random.default_rng(0).shuffle(data)
    assert inflate(deflate(data)) == data.tobytes()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65_535, 65_536, 65_537, 300_001])
def test_adler32_equals_that_of_zlib(size):
    for data in (np.full(size, 255, np.uint8), np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)):
        assert png_filters.adler32(data) == zlib.adler32(data)


def test_kernels_release_the_gil():
    """With a switch interval of a minute, another thread advances during a kernel only if the GIL is released."""
    data = np.random.default_rng(0).integers(0, 256, 30_000_000, dtype=np.uint8)
    started, ticks, stop = threading.Event(), [0], threading.Event()

    def count() -> None:
        started.set()
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(1e-4)  # releases the GIL to the main thread

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    counter.start()
    started.wait()
    try:
        sys.setswitchinterval(60)
        advanced = 0
        for _ in range(20):
            before = ticks[0]
            png_deflate.histogram(data, np.empty((0, 2), np.int64))
            png_filters.adler32(data)
            advanced = max(advanced, ticks[0] - before)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        counter.join()
    assert advanced


def square(x):
    return x * x


def full_disk(path: Path, content: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestCache:
    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
        monkeypatch.setattr(numba.config, "CACHE_DIR", "")  # restored afterwards
        choose_code_cache(tmp_path)
        yield tmp_path
        delete_temporary()
        choose_code_cache()

    @pytest.fixture
    def hits(self, caplog: pytest.LogCaptureFixture) -> Callable[[], tuple[int, str]]:
        """Call a kernel as a new process would; return the number of cache hits, and what is logged."""

        def call() -> tuple[int, str]:
            caplog.clear()
            compiled = numba_kernel.kernel(square)
            assert compiled(3) == 9
            numba_kernel.warn_about_cache()
            return sum(compiled.stats.cache_hits.values()), caplog.text

        return call

    def file(self, cache: Path) -> Path:
        (path,) = (path for path in cache.rglob("*") if path.is_file())
        return path

    def test_a_kernel_is_compiled_once(self, hits):
        assert hits() == (0, "")
        assert hits() == (1, "")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[:20],
            lambda content: content[: len(content) // 2],
            lambda content: content[:-1],
            lambda content: bytes(len(content)),
            lambda content: os.urandom(len(content)),
            lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        ],
        ids=["empty", "in the digest", "half", "one byte less", "zeros", "random", "one bit"],
    )
    def test_a_damaged_kernel_is_compiled_again_with_a_warning(self, cache: Path, hits, damage):
        hits()
        self.file(cache).write_bytes(damage(self.file(cache).read_bytes()))
        count, logged = hits()
        assert count == 0
        assert "1 damaged kernels" in logged
        assert hits() == (1, "")

    def test_a_file_that_cannot_be_read_or_replaced_is_only_reported(self, cache: Path, hits):
        hits()
        path = self.file(cache)
        path.unlink()
        path.mkdir()
        count, logged = hits()
        assert count == 0
        assert "damaged" in logged
        assert "cannot be cached" in logged

    def test_without_a_writable_directory_kernels_are_compiled_in_memory(self, monkeypatch, cache: Path, hits):
        (cache / "file").touch()
        monkeypatch.setattr(code_cache, "temporary_parents", lambda: [cache / "missing"])
        choose_code_cache(cache / "file" / "cache")
        assert hits() == (0, "")  # the choice has logged a warning
        assert hits() == (0, "")

    def test_a_directory_that_becomes_unwritable_is_reported(self, cache: Path, hits):
        (folder,) = (cache / f"uid-{os.geteuid()}").glob("pid-*")
        (folder / "numba").touch()
        count, logged = hits()
        assert count == 0
        assert "kernels cannot be cached" in logged
        assert "--cache-dir" in logged

    def test_on_a_full_disk_kernels_are_compiled_in_memory(self, monkeypatch, cache: Path, hits):
        monkeypatch.setattr(Path, "write_bytes", full_disk)
        count, logged = hits()
        assert count == 0
        assert "No space left" in logged
        assert not [path for path in cache.rglob("*") if path.is_file()]
