"""Unix sockets: files of servers that no longer run are replaced, those of others are kept."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from server.process.listen import Address, listening
from server.process.unix_socket import UnixSocket
from tests.server.process.config_errors import message_of


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path, whatever the length of the temporary directory."""
    monkeypatch.chdir(tmp_path)
    return Path("socket")


def message(path: Path) -> str:
    return message_of(lambda: UnixSocket(path))


def test_the_file_exists_while_the_server_runs(path: Path):
    with listening(Address(unix_socket=path)) as listener:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        listener.sockets[0].listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_the_file_is_removed_from_another_working_directory(path: Path, tmp_path: Path):
    with listening(Address(unix_socket=path)):
        os.chdir("/")
    assert not (tmp_path / path).exists()


def test_a_file_that_no_process_has_open_is_replaced(path: Path):
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(path))
    assert path.exists()
    with listening(Address(unix_socket=path)) as listener:
        listener.sockets[0].listen()


@pytest.mark.parametrize("listens", [False, True])
def test_a_socket_of_a_running_server_is_kept_even_if_it_does_not_listen_yet(path: Path, listens: bool):
    with listening(Address(unix_socket=path)) as listener:
        if listens:
            listener.sockets[0].listen()
        before = path.stat().st_ino
        assert "is in use" in message(path)
        assert path.stat().st_ino == before


def test_a_socket_of_another_type_is_kept(path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        assert "is in use" in message(path)


def test_another_kind_of_file_is_kept(path: Path):
    path.write_text("notes")
    assert "exists and is not a socket" in message(path)
    assert path.read_text() == "notes"
    path.unlink()
    path.mkdir()
    assert "exists and is not a socket" in message(path)


def test_the_file_of_a_successor_is_kept(path: Path):
    first = UnixSocket(path)
    path.unlink()
    second = UnixSocket(path)
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_paths_that_cannot_be_used_are_errors(path: Path):
    assert "longer than the 107 bytes" in message(Path("ä" * 54))
    UnixSocket(Path("x" * 107)).close()
    assert "No such file or directory" in message(Path("missing/socket"))
    path.write_text("")
    assert "Not a directory" in message(path / "socket")
