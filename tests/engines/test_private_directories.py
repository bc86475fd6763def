"""Private directories: their permissions, and every reason why one is rejected."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import private_directories
from engines.private_directories import delete_temporary, open_private, open_temporary, temporary_parents

NOBODY = 65534
OTHER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to work as another user")


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Work as a user without privileges; root could write anywhere."""
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A directory like /tmp, below directories that everybody can enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o711)
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o1777)
    return public


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


class TestPrivate:
    def test_missing_directories_are_created_and_only_this_user_can_enter(self, tmp_path: Path):
        path = open_private(tmp_path / "a" / "b")
        assert path == tmp_path / "a" / "b" / f"uid-{os.geteuid()}"
        assert mode(path) == 0o700
        assert not list(path.iterdir())
        assert open_private(tmp_path / "a" / "b") == path  # also if it exists

    def test_a_directory_whose_group_is_that_of_the_process_is_accepted(self, tmp_path: Path):
        """Kubernetes adds such permissions to volumes at every start of a pod."""
        open_private(tmp_path).chmod(0o2770)
        assert open_private(tmp_path).is_dir()

    def test_a_directory_that_others_can_write_to_is_rejected(self, tmp_path: Path):
        open_private(tmp_path).chmod(0o777)
        with pytest.raises(OSError, match=r"uid-\d+: other users can write to it"):
            open_private(tmp_path)

    def test_a_directory_below_one_that_others_can_write_to_is_rejected(self, tmp_path: Path):
        """They could replace it after it was checked."""
        tmp_path.chmod(0o777)
        with pytest.raises(OSError, match=f"other users can write to {tmp_path}"):
            open_private(tmp_path / "a")
        tmp_path.chmod(0o1777)
        assert open_private(tmp_path / "a").is_dir()

    def test_a_mount_point_that_everybody_can_write_to_is_accepted(self, tmp_path: Path, monkeypatch):
        tmp_path.chmod(0o777)
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
        assert mode(open_private(tmp_path)) == 0o700

    def test_a_symbolic_link_is_rejected(self, tmp_path: Path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / f"uid-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="Not a directory"):
            open_private(tmp_path)

    def test_a_file_is_rejected(self, tmp_path: Path):
        (tmp_path / "cache").touch()
        with pytest.raises(OSError, match="cache: File exists"):
            open_private(tmp_path / "cache")

    def test_a_full_disk_is_rejected(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(private_directories, "REQUIRED_BYTES", 2**60)
        with pytest.raises(OSError, match=r"MiB are free"):
            open_private(tmp_path)

    @needs_root
    def test_a_directory_of_another_user_is_rejected(self, public: Path):
        (public / f"uid-{NOBODY}").mkdir()
        os.chown(public / f"uid-{NOBODY}", OTHER, OTHER)
        with (
            nobody(),
            pytest.raises(OSError, match=f"it belongs to uid {OTHER}, but .* as uid {NOBODY}"),
        ):
            open_private(public)

    @needs_root
    def test_a_directory_below_one_of_another_user_is_rejected(self, public: Path):
        (public / "cache").mkdir()
        (public / "cache").chmod(0o777)
        os.chown(public / "cache", OTHER, OTHER)
        with nobody(), pytest.raises(OSError, match=f"cache belongs to uid {OTHER}"):
            open_private(public / "cache")

    @needs_root
    def test_a_directory_without_permission_is_rejected(self, public: Path):
        public.chmod(0o755)
        with nobody(), pytest.raises(OSError, match="public: Permission denied"):
            open_private(public)

    @needs_root
    def test_users_share_a_sticky_directory(self, public: Path):
        own = open_private(public)
        with nobody():
            other = open_private(public)
        assert own != other
        assert other.stat().st_uid == NOBODY


@needs_root
@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("noexec", "it may be mounted with noexec"), ("size=1m", "MiB are free")],
)
def test_a_file_system_that_cannot_be_used_is_rejected(tmp_path: Path, options: str, reason: str):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path], capture_output=True)  # noqa: S607
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError, match=reason):
            open_private(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)  # noqa: S607


class TestTemporary:
    def test_the_first_usable_parent_gets_a_directory_that_is_deleted_on_request(self, tmp_path: Path):
        (tmp_path / "file").touch()
        path = open_temporary([tmp_path / "missing", tmp_path / "file", tmp_path])
        assert path.parent == tmp_path
        assert mode(path) == 0o700
        (path / "code").touch()
        delete_temporary()
        assert not path.exists()

    def test_without_a_usable_parent_the_error_names_all_reasons(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"missing: No such file or directory; .*file: Not a directory"):
            open_temporary([tmp_path / "missing", tmp_path / "file"])

    def test_it_is_deleted_when_the_process_ends(self, tmp_path: Path):
        program = (
            "import sys; from pathlib import Path; from engines.private_directories import open_temporary;"
            "print(open_temporary([Path(sys.argv[1])]).is_dir())"
        )
        ended = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
        assert ended.stdout == "True\n"
        assert not list(tmp_path.iterdir())

    def test_directories_of_killed_processes_are_deleted_and_those_in_use_kept(self, tmp_path: Path):
        abandoned, used, new = (tmp_path / f"pid-compiled-{name}" for name in ("abandoned", "used", "new"))
        for path in (abandoned, used, new):
            path.mkdir()
        long_ago = time.time() - 3600
        for path in (abandoned, used):
            os.utime(path, (long_ago, long_ago))
        descriptor = os.open(used, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            open_temporary([tmp_path])
        finally:
            os.close(descriptor)
            delete_temporary()
        assert sorted(tmp_path.iterdir()) == [new, used]

    def test_the_environment_selects_the_first_parent(self, monkeypatch):
        monkeypatch.setenv("TMPDIR", "/scratch")
        assert temporary_parents()[0] == Path("/scratch")
        monkeypatch.delenv("TMPDIR")
        assert Path("/tmp") in temporary_parents()  # noqa: S108
