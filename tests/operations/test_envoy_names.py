"""docker/envoy/envoy.yaml with the name of a headless Service: one name with an address per server."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import yaml

from loadtest.processes import free_port
from tests.operations.clusters import Envoy
from tests.programs import ROOT, program, running
from tests.waiting import until

pytestmark = pytest.mark.operate

ADDRESSES = ("127.0.0.1", "127.0.0.2")  # of two servers at the same port


class Server(BaseHTTPRequestHandler):
    """Every path returns the address of the server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.server.server_address[0].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Names(socketserver.BaseRequestHandler):
    """A DNS server that returns `addresses` for every name, and no address for IPv6."""

    addresses: ClassVar[tuple[str, ...]] = ()

    def handle(self) -> None:
        query, reply = self.request
        end = query.index(0, 12) + 5  # of the question: the name, its type and its class
        found = self.addresses if query[end - 3] == 1 else ()
        header = query[:2] + b"\x81\x80\0\1" + len(found).to_bytes(2, "big") + bytes(4)
        answers = [b"\xc0\x0c\0\1\0\1" + (1).to_bytes(4, "big") + b"\0\4" + socket.inet_aton(one) for one in found]
        reply.sendto(header + query[12:end] + b"".join(answers), self.client_address)


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever)
    with server:
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def write_configuration(path: Path, port: int, server_port: int, dns_port: int) -> None:
    """Write the shipped configuration with one name instead of the two addresses, and this DNS server."""
    configuration = yaml.safe_load((ROOT / Envoy.shipped).read_text())
    configuration["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"] = port
    (cluster,) = configuration["static_resources"]["clusters"]
    named = {"endpoint": {"address": {"socket_address": {"address": "decoders.test", "port_value": server_port}}}}
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [named]}]
    resolver = {"socket_address": {"address": "127.0.0.1", "port_value": dns_port, "protocol": "UDP"}}
    cares = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig"
    cluster["typed_dns_resolver_config"] = {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {"@type": cares, "resolvers": [resolver]},
    }
    path.write_text(yaml.safe_dump(configuration))


def test_servers_that_are_added_to_the_name_get_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    port, server_port = free_port(), free_port()
    names = socketserver.UDPServer(("127.0.0.1", 0), Names)
    servers = [ThreadingHTTPServer((address, server_port), Server) for address in ADDRESSES]
    monkeypatch.setattr(Names, "addresses", ADDRESSES[:1])
    write_configuration(tmp_path / "envoy.yaml", port, server_port, names.server_address[1])
    command = [program("envoy"), "-c", tmp_path / "envoy.yaml", "--use-dynamic-base-id", "--concurrency", "1"]

    def reached() -> set[str]:
        with contextlib.suppress(httpx.TransportError):
            return {httpx.get(f"http://127.0.0.1:{port}/").text for _ in range(16)}
        return set()

    with contextlib.ExitStack() as stack:
        for server in (names, *servers):
            stack.enter_context(serving(server))
        stack.enter_context(running(command, tmp_path / "envoy.log"))
        until(lambda: reached() == {ADDRESSES[0]}, "the first server")
        monkeypatch.setattr(Names, "addresses", ADDRESSES)
        until(lambda: reached() == set(ADDRESSES), "the second server")
