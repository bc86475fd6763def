"""docker/compose.yaml in real containers, by podman-compose; without Grafana, for which no image can be built here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from loadtest.processes import free_port
from tests.operations.conftest import samples
from tests.operations.podman import Container, Podman
from tests.programs import ROOT, program
from tests.waiting import until

pytestmark = pytest.mark.operate

BODY = save({"latent": np.zeros((16, 16, 16), np.float32)})
COMPOSE = ROOT / "docker/compose.yaml"
PROFILES = ("--profile", "gpu", "--profile", "load")
SECONDS = 180.0  # for one command and for one change of state
# Replaces only what this machine lacks: fixed ports that are free, Docker Hub, a GPU and its bundle.
OVERRIDES = """
services:
  server: {{ports: !override ["127.0.0.1:{server}:8000"]}}
  server-gpu:
    image: pid-decode-server:cpu
    command: [--bundle, /bundles/demo]
    ports: !override ["127.0.0.1:{server_gpu}:8000"]
    volumes: !override ["bundles:/bundles:ro", "cache-gpu:/cache"]
    deploy: !reset null
  prometheus:
    image: localhost/prometheus-of-debian
    ports: !override ["127.0.0.1:{prometheus}:9090"]
"""
# The server rejects faults unless it listens on loopback only.
FAULTY = """
services:
  server: {command: [--bundle, /bundles/demo, --host, 127.0.0.1, --faults, poison-device, --allow-faults]}
"""
DECODE = """
import http.client, numpy, safetensors.numpy
body = safetensors.numpy.save({"latent": numpy.zeros((16, 16, 16), "float32")})
connection = http.client.HTTPConnection("127.0.0.1", 8000)
connection.request("POST", "/decode", body)
print(connection.getresponse().status)
"""
# podman-compose makes podman require the containers of `depends_on`. Podman then does not restart the server, because
# the container `bundle` has ended.
RESTARTABLE = ("--no-deps", "--force-recreate", "server")
FAST = """
services:
  prometheus:
    volumes:
      - {folder}/prometheus.yml:/etc/prometheus/prometheus.yml:ro
      - {folder}/rules.yml:/etc/prometheus/rules.yml:ro
"""


class Compose:
    """The project of docker/compose.yaml in one storage of podman."""

    def __init__(self, podman: Podman, folder: Path) -> None:
        self.podman, self.folder = podman, folder
        names = ("server", "server_gpu", "prometheus")
        ports = {name: free_port() for name in names}
        self.server, self.server_gpu, self.prometheus = (f"http://127.0.0.1:{ports[name]}" for name in names)
        self._overrides = folder / "overrides.yaml"
        self._overrides.write_text(OVERRIDES.format(**ports))

    def __call__(self, *arguments: object, changes: str = "") -> str:
        """Return the output of `podman-compose ARGUMENTS`; fail the test if the exit status is not 0.

        Args:
            arguments: A command, and flags before and after it.
            changes: Content of a further compose file.
        """
        files = [COMPOSE, self._overrides]
        if changes:
            files.append(self.folder / "changes.yaml")
            files[-1].write_text(changes)
        command = [program("podman-compose"), *(f"--file={file}" for file in files), *map(str, arguments)]
        environment = self.podman.environment
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def up(self, *arguments: str, changes: str = "") -> None:
        """Start services from the images that exist."""
        self(*PROFILES, "up", "--detach", "--no-build", *arguments, changes=changes)

    def container(self, service: str) -> Container:
        """Return the container of a service."""
        return Container(self.podman, f"pid_{service}_1")

    def wait_until_healthy(self) -> None:
        """Run the health check of the server until it succeeds, because podman needs systemd to run it regularly."""
        check = ("healthcheck", "run", self.container("server").name)
        until(lambda: self.podman.attempt(*check).returncode == 0, "the server to be healthy", SECONDS)
        assert self.container("server").state["Health"]["Status"] == "healthy"

    def restarts(self) -> int:
        """Return how often podman has restarted the server since it was created."""
        return int(self.podman.inspect("container", self.container("server").name)["RestartCount"])

    def decode(self) -> httpx.Response:
        """Decode an image at the published port."""
        return httpx.post(f"{self.server}/decode", content=BODY, timeout=60)

    def alerts(self) -> set[tuple[str, str]]:
        """Return the names and instances of the alerts that fire."""
        alerts = httpx.get(f"{self.prometheus}/api/v1/alerts", timeout=20).json()["data"]["alerts"]
        firing = [alert["labels"] for alert in alerts if alert["state"] == "firing"]
        return {(labels["alertname"], labels.get("instance", "")) for labels in firing}


@pytest.fixture(scope="module")
def compose(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The bundle, the server, which is healthy, and Prometheus."""
    build = ("build", "--isolation", "chroot", "--format", "docker", "--tag", "prometheus-of-debian")
    podman(*build, "--file", Path(__file__).with_name("prometheus.Containerfile"), tmp_path_factory.mktemp("empty"))
    folder = tmp_path_factory.mktemp("compose")
    folder.chmod(0o755)
    compose = Compose(podman, folder)
    try:
        compose.up("server", "prometheus")
        compose.wait_until_healthy()
        yield compose
    except BaseException:
        print(compose.container("server").logs())
        raise
    finally:
        compose(*PROFILES, "down", "--volumes")


def test_the_server_starts_after_the_bundle_was_built(compose: Compose):
    assert compose.podman("wait", compose.container("bundle").name) == "0"
    assert compose.restarts() == 0  # as it would without a bundle
    assert "/bundles/demo" in compose.container("server").run("cat", "/proc/1/cmdline")


@pytest.mark.parametrize("service", ["bundle", "server"])
def test_the_containers_are_confined(compose: Compose, service: str):
    description = compose.podman.inspect("container", compose.container(service).name)
    assert description["HostConfig"]["ReadonlyRootfs"]
    assert not description["EffectiveCaps"]
    assert not description["BoundingCaps"]
    assert "no-new-privileges" in description["HostConfig"]["SecurityOpt"]


def test_the_server_writes_only_to_its_cache_and_to_tmp(compose: Compose):
    server = compose.container("server")
    for place, status in (("/app", 1), ("/bundles", 1), ("/cache", 0), ("/tmp", 0)):  # noqa: S108  in the container
        assert compose.podman.attempt("exec", server.name, "touch", f"{place}/x").returncode == status, place


def test_an_image_is_decoded_at_the_published_port(compose: Compose):
    response = compose.decode()
    assert response.status_code == 200, response.text
    assert response.content.startswith(b"\x89PNG")


def test_the_ports_are_published_on_loopback_only(compose: Compose):
    for service in ("server", "prometheus"):
        description = compose.podman.inspect("container", compose.container(service).name)
        bindings = description["NetworkSettings"]["Ports"].values()
        assert {binding["HostIp"] for of_port in bindings for binding in of_port or ()} == {"127.0.0.1"}


def test_the_service_load_sends_requests_that_the_server_decodes(compose: Compose, tmp_path: Path):
    tmp_path.chmod(0o777)
    flags = ("run", "--rm", "-T", "--volume", f"{tmp_path}:/tmp/report")
    compose(*PROFILES, *flags, "load", "/scenario.toml", "--duration", 20)
    total = json.loads((tmp_path / "report.json").read_text())["summary"]["total"]
    assert total["in_time"] > 0  # the load exceeds what a busy machine can serve


def test_prometheus_scrapes_the_server_by_its_name_with_the_shipped_configuration(compose: Compose):
    assert compose.decode().status_code == 200
    address = f"{compose.container('server').address}:8000"
    until(lambda: bool(samples(compose.prometheus, f'up{{job="pid", instance="{address}"}} == 1')), "a scrape", SECONDS)
    until(lambda: bool(samples(compose.prometheus, 'pid_requests_total{code="200"} > 0')), "a request", SECONDS)
    groups = httpx.get(f"{compose.prometheus}/api/v1/rules", timeout=20).json()["data"]["groups"]
    rules = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert "PidDown" in rules
    assert "err" not in rules.values()


def test_the_alert_for_a_paused_server_fires_and_resolves(compose: Compose, tmp_path: Path):
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    # Minutes become seconds.
    shipped = ROOT / "docker/prometheus"
    rules = re.sub(r"^( +for: \d+)m\b", r"\1s", (shipped / "rules.yml").read_text(), flags=re.MULTILINE)
    (tmp_path / "rules.yml").write_text(rules)
    configuration = (shipped / "prometheus.yml").read_text().replace(": 15s", ": 2s")
    (tmp_path / "prometheus.yml").write_text(configuration)
    compose.up("prometheus", "server-gpu", changes=FAST.format(folder=tmp_path))
    servers = {service: f"{compose.container(service).address}:8000" for service in ("server", "server-gpu")}
    for address in servers.values():
        query = f'up{{instance="{address}"}} == 1'
        until(lambda query=query: bool(samples(compose.prometheus, query)), f"a scrape of {address}", SECONDS)

    paused = ("PidDown", servers["server"])
    assert paused not in compose.alerts()
    compose.podman("pause", compose.container("server").name)
    try:
        until(lambda: paused in compose.alerts(), "PidDown to fire", SECONDS)
    finally:
        compose.podman("unpause", compose.container("server").name)
    until(lambda: paused not in compose.alerts(), "PidDown to resolve", SECONDS)


def test_a_killed_server_is_restarted(compose: Compose):
    compose.up(*RESTARTABLE)
    compose.wait_until_healthy()
    os.kill(compose.container("server").state["Pid"], signal.SIGKILL)
    until(lambda: compose.restarts() == 1, "the restart", SECONDS)
    compose.wait_until_healthy()
    assert compose.decode().status_code == 200


def test_a_server_with_a_lost_device_is_restarted_and_stops_with_status_0(compose: Compose):
    compose.up(*RESTARTABLE, changes=FAULTY)
    compose.wait_until_healthy()
    server = compose.container("server")
    assert server.run("python", "-c", DECODE) == "503"
    until(lambda: compose.restarts() == 1, "the restart", SECONDS)
    compose.wait_until_healthy()
    died = ("events", "--stream=false", "--filter", f"container={server.name}", "--filter", "event=died")
    assert compose.podman(*died, "--format", "{{.ContainerExitCode}}").splitlines()[-1] == "1"
    compose("stop", "server")
    assert not server.state["Running"]
    assert server.state["ExitCode"] == 0


def test_down_removes_everything(compose: Compose):
    compose(*PROFILES, "down", "--volumes")
    for command in (("ps", "--all"), ("volume", "ls"), ("pod", "ls")):
        assert not compose.podman(*command, "--quiet"), command
    assert compose.podman("network", "ls", "--quiet") == "podman"
