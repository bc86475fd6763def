"""Two real servers on simulated devices behind a real load balancer with its shipped configuration."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save

from loadtest.processes import free_port
from tests.programs import ROOT, program, running
from tests.waiting import responds, until

SHIPPED_PORTS = (8001, 8002, 8000)  # of the two servers and of the load balancer
BODY = save({"latent": np.zeros((16, 8, 8), np.float32)})
EIGHT = save({"latent": np.zeros((8, 16, 8, 8), np.float32)})
LARGE = save({"latent": np.zeros((16, 8, 8), np.float32), "caption": np.zeros((300, 2304), np.float32)})  # 2.8 MB
HEADERS = {"Content-Type": "application/x-safetensors"}


class Cluster:
    """Two servers behind a load balancer. Subclasses start the load balancer."""

    shipped: ClassVar[Path]  # the configuration, relative to the repository
    body_limit: ClassVar[str]  # pattern of the size of a body in `shipped`
    wait_limit: ClassVar[str]  # pattern of the seconds for which a response may be awaited

    def __init__(self, folder: Path, stack: contextlib.ExitStack, drain_delay: int = 2) -> None:
        self.folder, self.stack, self.drain_delay = folder, stack, drain_delay
        self.ports, self.port = (free_port(), free_port()), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.configuration = (ROOT / self.shipped).read_text()
        self.servers = [self.start(port) for port in self.ports]
        for port in self.ports:
            self.wait_until_ready(port)
        stack.enter_context(running(self.command(), folder / "balancer.log"))
        until(lambda: responds(f"{self.url}/info"), "the load balancer")

    def start(self, port: int) -> subprocess.Popen[bytes]:
        flags = ["--drain-delay", self.drain_delay, "--encoder-threads", 1, "--queue-images", 16, "--port", port]
        command = [sys.executable, "-m", "tests.operations.gpu_server", *map(str, flags)]
        return self.stack.enter_context(running(command, self.folder / f"{port}.log"))

    def wait_until_ready(self, port: int) -> None:
        until(lambda: responds(f"http://127.0.0.1:{port}/health/ready"), f"the server at {port}")

    def command(self) -> list[str | Path]:
        """Return the command that starts the load balancer."""
        raise NotImplementedError

    def with_ports(self, address: str) -> str:
        """Return the shipped configuration with the ports of this cluster; `address` has one `{}` for the port."""
        configuration = self.configuration
        for shipped, used in zip(SHIPPED_PORTS, (*self.ports, self.port), strict=True):
            assert configuration.count(address.format(shipped)) == 1
            configuration = configuration.replace(address.format(shipped), address.format(used))
        return configuration

    def decode(self, **options: object) -> httpx.Response:
        return self.send(BODY, **options)

    def send(self, body: bytes, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}/decode", content=body, headers=HEADERS, params=options, timeout=60)

    def count(self, name: str, **labels: str) -> list[float]:
        """Return the value of a metric on each server, summed over all series with these labels."""
        return [sum(_samples(port, name, labels)) for port in self.ports]


class Nginx(Cluster):
    shipped = Path("docker/nginx/decoders.conf")
    body_limit = r"client_max_body_size (\d+m);"
    wait_limit = r"proxy_read_timeout (\d+)s;"

    def command(self) -> list[str | Path]:
        """Write the shipped site into a minimal nginx.conf."""
        names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{name}_temp_path {self.folder}/{name};" for name in names)
        path = self.folder / "nginx.conf"
        head = f"daemon off; user root; pid {self.folder}/nginx.pid; worker_processes 2; events {{}}"
        path.write_text(f"{head} http {{ access_log off; {paths} {self.with_ports('127.0.0.1:{}')} }}")
        return [program("nginx"), "-c", path, "-e", "stderr"]


class Envoy(Cluster):
    shipped = Path("docker/envoy/envoy.yaml")
    body_limit = r"request_body_buffer_limit: (\d+)"
    wait_limit = r"idle_timeout: (\d+)s # --max-deadline"

    def command(self) -> list[str | Path]:
        path = self.folder / "envoy.yaml"
        path.write_text(self.with_ports("port_value: {}}}"))
        # With the default base id, a second Envoy on this machine would fail.
        return [program("envoy"), "-c", path, "--use-dynamic-base-id", "--concurrency", "2", "--log-level", "warning"]


def _samples(port: int, name: str, labels: dict[str, str]) -> Iterator[float]:
    for family in text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample.value
