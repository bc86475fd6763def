"""Binding to an address, with a message for each reason that prevents it."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from server.process.listen import Address, allow_restart, bind, listening
from tests.server.process.config_errors import message_of


def test_a_free_port_is_bound_but_does_not_listen_yet():
    (bound,) = bind("127.0.0.1", 0)
    with bound, socket.socket() as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(bound.getsockname())
        bound.listen()
        socket.create_connection(bound.getsockname()).close()


def test_a_name_with_several_addresses_is_bound_on_all_of_them(monkeypatch: pytest.MonkeyPatch):
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{host}", 0)) for host in (1, 2, 1)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    first, second = bind("several.example", 0)
    with first, second:
        assert [each.getsockname()[0] for each in (first, second)] == ["127.0.0.1", "127.0.0.2"]
        assert first.getsockname()[1] == second.getsockname()[1] != 0


def message(host: str, port: int) -> str:
    return message_of(lambda: bind(host, port))


def test_a_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = message("127.0.0.1", port)
    assert f"127.0.0.1 port {port}: the port is in use" in text


def test_a_port_of_a_server_that_does_not_listen_yet_is_in_use():
    with listening(Address()) as other:
        assert "the port is in use" in message("127.0.0.1", other.sockets[0].getsockname()[1])


def test_a_port_can_be_bound_again_after_a_server_has_closed_its_connections():
    with listening(Address()) as listener:
        (first,) = listener.sockets
        address = first.getsockname()
        allow_restart(first)
        first.listen()
        with socket.create_connection(address) as client:
            first.accept()[0].close()  # closing first leaves the connection in TIME_WAIT
            client.recv(1)
    with listening(Address(port=address[1])) as second:
        assert second.sockets[0].getsockname() == address


def test_an_address_of_another_machine_is_an_error():
    assert "this machine does not have the address" in message("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "1.2.3.4.5", "a" * 64 + ".example", "x..y"])
def test_an_invalid_host_is_an_error(host: str):
    assert f"--host {host} is not a valid address" in message(host, 0)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EACCES, "this user may not use the port; choose a --port above 1023"), (errno.EIO, "Input/output error")],
)
def test_the_reason_of_the_system_is_explained(monkeypatch: pytest.MonkeyPatch, number: int, expected: str):
    def fail(self: socket.socket, address: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", fail)
    assert expected in message("127.0.0.1", 80)
