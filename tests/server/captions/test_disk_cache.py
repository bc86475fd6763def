"""The cache on disk: restarts, damage, eviction, several processes, and file systems that fail."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from server.captions.disk_cache import DiskCache

SHAPE = (6, 16)
GENEROUS = 2**30


def embedding(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def open_cache(directory: Path, max_bytes: int = GENEROUS, identity: str = "encoder", **options) -> DiskCache:
    return DiskCache(directory, max_bytes, identity, SHAPE, **options)


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def only_file(directory: Path) -> Path:
    (path,) = files(directory)
    return path


@pytest.fixture(scope="module")
def file_size(tmp_path_factory: pytest.TempPathFactory) -> int:
    directory = tmp_path_factory.mktemp("sample")
    open_cache(directory).put("a", embedding())
    return only_file(directory).stat().st_size


def used(directory: Path) -> int:
    return sum(path.stat().st_size for path in files(directory))


def age(path: Path, seconds: float) -> None:
    """Make the last use of a file earlier."""
    os.utime(path, (time.time() - seconds, time.time() - seconds))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestContent:
    def test_another_cache_finds_what_one_has_stored(self, tmp_path: Path):
        """As after a restart, or in another process."""
        cache = open_cache(tmp_path)
        assert cache.get("a cat") is None
        cache.put("a cat", embedding(1))
        cache.put("", embedding(2))
        other = open_cache(tmp_path)
        assert torch.equal(other.get("a cat"), embedding(1))
        assert torch.equal(other.get(""), embedding(2))
        assert other.get("A cat") is None
        assert other.get("a cat").dtype == torch.bfloat16
        assert (cache.damaged, cache.failures, other.damaged, other.failures) == (0, 0, 0, 0)

    def test_an_embedding_is_found_for_its_encoder_only(self, tmp_path: Path):
        open_cache(tmp_path, identity="one").put("a cat", embedding())
        other = open_cache(tmp_path, identity="two")
        assert other.get("a cat") is None
        assert other.damaged == 0
        assert len(files(tmp_path)) == 1

    def test_an_embedding_can_be_replaced(self, tmp_path: Path):
        cache = open_cache(tmp_path)
        cache.put("a", embedding(1))
        cache.put("a", embedding(2))
        assert torch.equal(cache.get("a"), embedding(2))
        assert len(files(tmp_path)) == 1

    @pytest.mark.parametrize("prompt", ["\0", "../../x", "é" * 20_000, "\ud800"])
    def test_any_text_is_a_key(self, tmp_path: Path, prompt: str):
        cache = open_cache(tmp_path)
        cache.put(prompt, embedding())
        assert torch.equal(cache.get(prompt), embedding())
        assert only_file(tmp_path).parent.name == f"uid-{os.geteuid()}"

    def test_views_are_stored_as_they_are(self, tmp_path: Path):
        cache = open_cache(tmp_path)
        transposed = embedding(1, (SHAPE[1], SHAPE[0])).T
        cache.put("transposed", transposed)
        assert torch.equal(cache.get("transposed"), transposed)
        batch = torch.stack([embedding(2), embedding(3)])
        cache.put("row", batch[1])
        assert torch.equal(cache.get("row"), embedding(3))

    def test_a_file_is_a_safetensors_file_without_the_prompt(self, tmp_path: Path):
        open_cache(tmp_path).put("a secret cat", embedding())
        content = only_file(tmp_path).read_bytes()
        assert torch.equal(load(content)["caption"], embedding())
        assert b"cat" not in content
        assert "cat" not in only_file(tmp_path).name

    def test_only_this_user_can_read_the_files(self, tmp_path: Path):
        open_cache(tmp_path / "new" / "directory").put("a", embedding())
        path = only_file(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("wrong", [embedding(0, (6, 17)), embedding().float(), embedding()[None]])
    def test_a_wrong_tensor_is_an_error(self, tmp_path: Path, wrong: Tensor):
        with pytest.raises(ValueError, match="an embedding is bfloat16"):
            open_cache(tmp_path).put("a", wrong)


def flip(position: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        index = position(len(content))
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]

    return damage


def replace_tensor(tensor: Tensor) -> Callable[[bytes], bytes]:
    return lambda content: save({"caption": tensor}, {"key": "0" * 64, "sha256": "0" * 64})


DATA_BYTES = SHAPE[0] * SHAPE[1] * 2
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "only the length of the header": lambda content: content[:8],
    "without data": lambda content: content[:-DATA_BYTES],
    "without the last byte": lambda content: content[:-1],
    "with another byte": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "data of zeros": lambda content: content[:-DATA_BYTES] + bytes(DATA_BYTES),
    "garbage": lambda content: b"garbage " * 100,
    "bit of the length": flip(lambda size: 0),
    "bit of the header's first byte": flip(lambda size: 8),
    "bit of the key": flip(lambda size: 60),
    "bit of the hash": flip(lambda size: 150),
    "bit of the header's last byte": flip(lambda size: size - DATA_BYTES - 1),
    "bit of the first value": flip(lambda size: size - DATA_BYTES),
    "bit of the last value": flip(lambda size: size - 1),
    "wrong dtype": lambda content: content.replace(b"BF16", b"F16 ").replace(b'"F16 "', b'"F16" '),
    "wrong shape": lambda content: content.replace(b"[6,16]", b"[16,6]"),
    "other values and a wrong hash": replace_tensor(embedding(9)),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_a_damaged_file_is_deleted_and_stored_again(self, tmp_path: Path, damage, caplog):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        path = only_file(tmp_path)
        content = path.read_bytes()
        assert damage(content) != content
        path.write_bytes(damage(content))
        assert cache.get("a") is None
        assert not path.exists()
        assert (cache.damaged, cache.failures) == (1, 0)
        assert "is damaged" in caplog.text
        assert cache.get("a") is None
        cache.put("a", embedding())
        assert torch.equal(cache.get("a"), embedding())
        assert cache.damaged == 1

    def test_every_bit_of_a_file_is_checked(self, tmp_path: Path):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        path = only_file(tmp_path)
        content = path.read_bytes()
        for index in range(len(content)):
            path.write_bytes(flip(lambda size, index=index: index)(content))
            assert cache.get("a") is None, index
        assert cache.damaged == len(content)

    def test_the_file_of_another_prompt_is_not_used(self, tmp_path: Path):
        cache = open_cache(tmp_path)
        cache.put("a", embedding(1))
        first = only_file(tmp_path)
        cache.put("b", embedding(2))
        (second,) = set(files(tmp_path)) - {first}
        second.replace(first)
        assert cache.get("a") is None
        assert cache.damaged == 1

    def test_the_file_of_another_encoder_is_not_used(self, tmp_path: Path):
        one, two = open_cache(tmp_path, identity="one"), open_cache(tmp_path, identity="two")
        one.put("a", embedding(1))
        first = only_file(tmp_path)
        two.put("a", embedding(2))
        (second,) = set(files(tmp_path)) - {first}
        second.replace(first)
        assert one.get("a") is None
        assert one.damaged == 1

    def test_a_directory_in_place_of_a_file_is_a_failure(self, tmp_path: Path):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        path = only_file(tmp_path)
        path.unlink()
        path.mkdir()
        assert cache.get("a") is None
        cache.put("a", embedding())
        assert (cache.damaged, cache.failures) == (0, 2)
        assert not files(tmp_path)  # no temporary file is left


class TestEviction:
    def test_the_least_recently_used_file_is_deleted_first(self, tmp_path: Path, file_size: int):
        cache = open_cache(tmp_path, int(4.5 * file_size))
        for seconds, prompt in enumerate("abcd"):
            before = set(files(tmp_path))
            cache.put(prompt, embedding())
            (path,) = set(files(tmp_path)) - before
            age(path, 100 - seconds)
        cache.get("a")
        cache.put("e", embedding())
        assert [prompt for prompt in "abcde" if open_cache(tmp_path).get(prompt) is not None] == ["a", "c", "d", "e"]
        assert cache.bytes == used(tmp_path) == 4 * file_size

    def test_the_limit_is_never_exceeded(self, tmp_path: Path, file_size: int):
        limit = 10 * file_size + 5
        cache = open_cache(tmp_path, limit)
        for number in range(50):
            cache.put(str(number), embedding(number))
            assert used(tmp_path) <= limit
        assert used(tmp_path) >= limit * 3 // 4
        assert torch.equal(cache.get("49"), embedding(49))
        assert cache.failures == 0

    def test_files_of_earlier_processes_and_other_encoders_count(self, tmp_path: Path, file_size: int):
        earlier = open_cache(tmp_path, identity="earlier")
        for number in range(20):
            earlier.put(str(number), embedding())
        for path in files(tmp_path):
            age(path, 100)
        cache = open_cache(tmp_path, 10 * file_size)
        assert cache.bytes == 0
        cache.put("new", embedding())
        assert used(tmp_path) <= 10 * file_size
        assert cache.get("new") is not None
        assert cache.bytes == used(tmp_path)

    def test_processes_that_write_in_turn_exceed_the_limit_by_little(self, tmp_path: Path, file_size: int):
        limit = 128 * file_size
        caches = [open_cache(tmp_path, limit) for _ in range(3)]
        for number in range(400):
            caches[number % 3].put(str(number), embedding())
            assert used(tmp_path) <= limit + 3 * (limit // 64 + file_size)

    def test_files_of_others_are_ignored(self, tmp_path: Path, file_size: int):
        cache = open_cache(tmp_path, 3 * file_size)
        cache.put("a", embedding())
        note = only_file(tmp_path).with_name("README")
        note.write_bytes(bytes(100 * file_size))
        for number in range(5):
            cache.put(str(number), embedding())
        assert note.exists()
        assert cache.get("4") is not None

    def test_an_embedding_larger_than_the_limit_is_not_stored_and_nothing_is_deleted(self, tmp_path, file_size: int):
        open_cache(tmp_path).put("a", embedding())
        cache = open_cache(tmp_path, file_size - 1)
        cache.put("b", embedding())
        assert cache.get("b") is None
        assert cache.get("a") is not None

    def test_temporary_files_of_ended_processes_are_deleted(self, tmp_path: Path):
        open_cache(tmp_path).put("a", embedding())
        folder = only_file(tmp_path).parent
        abandoned, current = folder / "x.1.partial", folder / "x.2.partial"
        for path in (abandoned, current):
            path.write_bytes(b"half")
        age(abandoned, 2 * 86400)
        open_cache(tmp_path).put("b", embedding())
        assert not abandoned.exists()
        assert current.exists()

    def test_a_file_that_is_being_written_is_not_deleted(self, tmp_path: Path, file_size: int):
        cache = open_cache(tmp_path, 2 * file_size)
        cache.put("a", embedding())
        current = only_file(tmp_path).with_name("x.partial")
        current.write_bytes(b"half")
        age(current, 100)
        cache.put("b", embedding())
        assert current.exists()
        assert cache.get("a") is None

    def test_a_file_that_vanishes_during_the_scan_is_no_failure(self, tmp_path: Path, file_size: int, monkeypatch):
        cache = open_cache(tmp_path, 3 * file_size)
        for prompt in "abc":
            cache.put(prompt, embedding())
        unlink = os.unlink

        def late(path: str) -> None:
            unlink(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

        monkeypatch.setattr(os, "unlink", late)
        cache.put("d", embedding())
        assert cache.get("d") is not None
        assert cache.failures == 0

    def test_files_that_cannot_be_deleted_keep_new_ones_out_and_are_not_listed_each_time(
        self, tmp_path: Path, file_size: int, monkeypatch
    ):
        clock, scans = Clock(), list[str]()
        cache = open_cache(tmp_path, 20 * file_size, now=clock)
        for number in range(20):
            cache.put(str(number), embedding())
        scandir = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", failing(errno.EACCES))
            for _ in range(5):
                cache.put("new", embedding())
        assert len(scans) == 1
        assert cache.failures == 8  # deletions, not one for each file
        assert used(tmp_path) == 20 * file_size
        cache.put("new", embedding())
        assert cache.get("new") is None
        clock.now += 60
        cache.put("new", embedding())
        assert cache.get("new") is not None

    def test_the_directory_is_not_listed_for_each_embedding(self, tmp_path: Path, file_size: int, monkeypatch):
        scans = list[str]()
        scandir = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))
        cache = open_cache(tmp_path, 640 * file_size)
        for number in range(100):
            cache.put(str(number), embedding())
            cache.get(str(number))
        assert 1 <= len(scans) <= 11


def failing(number: int) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts and remounts a small file system in memory."""
    path = tmp_path / "mounted"
    path.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        return path

    yield mount
    while os.path.ismount(path):
        subprocess.run(["umount", path], check=True)  # noqa: S607


class TestFailures:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
    def test_a_failed_write_is_counted_and_logged_once(self, tmp_path: Path, monkeypatch, caplog, number: int):
        clock = Clock()
        cache = open_cache(tmp_path, now=clock)
        cache.put("a", embedding())
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing(number))
            for _ in range(3):
                cache.put("b", embedding())
                assert cache.get("b") is None
            assert cache.failures == 3
            assert [record.getMessage() for record in caplog.records] == [
                f"cannot write to the caption cache: [Errno {number}] {os.strerror(number)}"
            ]
            clock.now += 600
            cache.put("b", embedding())
            assert len(caplog.records) == 2
        assert len(files(tmp_path)) == 1  # no temporary file is left
        cache.put("b", embedding())
        assert torch.equal(cache.get("b"), embedding())

    def test_a_full_disk_is_a_failure_and_stored_embeddings_are_still_found(self, mounted):
        directory = mounted("size=64k")
        cache = open_cache(directory)
        for number in range(32):
            cache.put(str(number), embedding(number))
        assert cache.failures > 0
        assert torch.equal(cache.get("0"), embedding(0))
        assert all(path.suffix == ".safetensors" for path in files(directory))

    def test_a_read_only_directory_is_read(self, mounted):
        cache = open_cache(mounted("size=1m"))
        cache.put("a", embedding())
        restarted = open_cache(mounted("remount,ro"))
        for each in (cache, restarted):
            assert torch.equal(each.get("a"), embedding())
            each.put("b", embedding())
            assert each.get("b") is None
            assert (each.damaged, each.failures) == (0, 1)

    def test_a_file_system_without_execution_is_used(self, mounted):
        cache = open_cache(mounted("size=1m,noexec"))
        cache.put("a", embedding())
        assert cache.get("a") is not None

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
    def test_a_failed_read_is_a_miss(self, tmp_path: Path, monkeypatch, number: int, caplog):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", failing(number))
            assert cache.get("a") is None
        assert (cache.damaged, cache.failures) == (0, 1)
        assert "cannot read from the caption cache" in caplog.text
        assert cache.get("a") is not None

    def test_a_file_that_another_host_deleted_is_a_miss(self, tmp_path: Path, monkeypatch):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        monkeypatch.setattr(Path, "open", failing(errno.ESTALE))
        assert cache.get("a") is None
        assert cache.failures == 0

    def test_a_damaged_file_that_cannot_be_deleted_is_replaced(self, tmp_path: Path, monkeypatch):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        only_file(tmp_path).write_bytes(b"")
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", failing(errno.EACCES))
            assert cache.get("a") is None
            assert (cache.damaged, cache.failures) == (1, 1)
            cache.put("a", embedding())
        assert cache.get("a") is not None

    def test_the_time_of_the_last_use_need_not_be_writable(self, tmp_path: Path, monkeypatch):
        cache = open_cache(tmp_path)
        cache.put("a", embedding())
        monkeypatch.setattr(os, "utime", failing(errno.EROFS))
        assert cache.get("a") is not None
        assert cache.failures == 0

    def test_a_directory_that_cannot_be_listed_is_a_failure(self, tmp_path: Path, monkeypatch):
        clock = Clock()
        cache = open_cache(tmp_path, now=clock)
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", failing(errno.EACCES))
            for _ in range(3):
                cache.put("a", embedding())
        assert cache.get("a") is None
        assert cache.failures == 1
        clock.now += 60
        cache.put("a", embedding())
        assert cache.get("a") is not None

    def test_an_unusable_directory_is_used_as_soon_as_it_is_usable(self, tmp_path: Path, caplog):
        directory = tmp_path / "cache"
        directory.write_text("a file")
        cache = open_cache(directory)
        assert "cannot use the caption cache" in caplog.text
        assert cache.get("a") is None
        cache.put("a", embedding())
        assert cache.get("a") is None
        assert cache.failures == 2
        directory.unlink()
        cache.put("a", embedding())
        assert cache.get("a") is not None

    def test_a_directory_that_others_can_write_to_is_not_used(self, tmp_path: Path, caplog):
        open_cache(tmp_path).put("a", embedding())
        only_file(tmp_path).parent.chmod(0o777)
        cache = open_cache(tmp_path)
        assert cache.get("a") is None
        assert cache.failures == 1
        assert "other users can write to it" in caplog.text

    def test_a_deleted_directory_is_created_again(self, tmp_path: Path):
        cache = open_cache(tmp_path / "cache")
        cache.put("a", embedding())
        path = only_file(tmp_path)
        path.unlink()
        path.parent.rmdir()
        path.parent.parent.rmdir()
        assert cache.get("a") is None
        cache.put("a", embedding())
        assert torch.equal(cache.get("a"), embedding())
        assert cache.failures == 0

    @pytest.mark.parametrize("seed", range(5))
    def test_no_operation_of_the_file_system_may_raise_when_it_fails(
        self, tmp_path: Path, file_size: int, monkeypatch, seed: int
    ):
        """A fifth of all operations fail. Embeddings are then missing, never wrong, and the limit holds."""
        random, clock = Random(seed), Clock()
        cache = open_cache(tmp_path, 6 * file_size, now=clock)

        def flaky(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if random.random() < 0.2:
                    number = random.choice([errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES, errno.ENOSPC])
                    raise OSError(number, os.strerror(number))
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("mkdir", "stat", "lstat", "fstat", "scandir", "unlink", "utime", "replace"):
                patch.setattr(os, name, flaky(getattr(os, name)))
            patch.setattr(tempfile, "mkstemp", flaky(tempfile.mkstemp))
            patch.setattr(Path, "open", flaky(Path.open))
            for _ in range(400):
                number = random.randrange(10)
                if random.random() < 0.5:
                    cache.put(str(number), embedding(number))
                else:
                    kept = cache.get(str(number))
                    assert kept is None or torch.equal(kept, embedding(number))
                clock.now += 10
        assert cache.failures > 0
        assert cache.damaged == 0
        assert sum(path.stat().st_size for path in files(tmp_path) if path.suffix != ".partial") <= 6 * file_size
        clock.now += 60
        cache.put("new", embedding())
        assert torch.equal(cache.get("new"), embedding())


class TestConcurrency:
    def test_threads_read_and_write_at_the_same_time(self, tmp_path: Path, file_size: int):
        """Two caches, as of two processes, in four threads each; files are evicted while others are read."""
        limit = 20 * file_size
        caches = [open_cache(tmp_path, limit) for _ in range(2)]

        def use(worker: int) -> int:
            cache, found = caches[worker % 2], 0
            for step in range(60):
                number = (worker * 5 + step * 3) % 30
                if (kept := cache.get(str(number))) is None:
                    cache.put(str(number), embedding(number))
                else:
                    found += 1
                    assert torch.equal(kept, embedding(number))
            return found

        with ThreadPoolExecutor(8) as threads:
            found = sum(threads.map(use, range(8)))
        assert found > 0
        assert [(cache.damaged, cache.failures) for cache in caches] == [(0, 0), (0, 0)]
        assert used(tmp_path) <= limit + 8 * file_size
        assert all(path.suffix == ".safetensors" for path in files(tmp_path))

    def test_one_process_does_not_exceed_the_limit_with_several_threads(self, tmp_path: Path, file_size: int):
        limit = 8 * file_size
        cache = open_cache(tmp_path, limit)
        with ThreadPoolExecutor(3) as threads:
            for first in range(0, 90, 3):  # a listing during the writes would mix several states
                list(threads.map(lambda number: cache.put(str(number), embedding(number)), range(first, first + 3)))
                assert used(tmp_path) <= limit
        assert cache.failures == 0

    def test_processes_share_the_directory(self, tmp_path: Path, file_size: int):
        """Both write and read the same prompts; afterwards, a third one finds intact files within the limit."""

        def use() -> None:
            cache = open_cache(tmp_path, 20 * file_size)
            for number in [*range(30)] * 10:
                found = cache.get(str(number))
                assert found is None or torch.equal(found, embedding(number))
                cache.put(str(number), embedding(number))
            assert (cache.damaged, cache.failures) == (0, 0)

        running = [multiprocessing.get_context("fork").Process(target=use) for _ in range(2)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        assert [process.exitcode for process in running] == [0, 0]
        cache = open_cache(tmp_path)
        found = {number: kept for number in range(30) if (kept := cache.get(str(number))) is not None}
        assert torch.equal(found[29], embedding(29))
        assert len(found) == len(files(tmp_path)) <= 22
        assert cache.damaged == 0
