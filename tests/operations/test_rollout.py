"""Rolling updates of two containers behind nginx in a container, during a load. Print the figures with `pytest -rP`."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.size import Size
from loadtest.generator import Generator
from loadtest.http_client import Client, Connection
from loadtest.outcome import Outcome, OutcomeKind
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import make_schedule
from loadtest.summary import percentile
from loadtest.target import Target, inspect_server
from tests.operations.podman import CONFINED, CPU_IMAGE, PORT, Container, Podman
from tests.programs import ROOT, run
from tests.waiting import responds, until

pytestmark = pytest.mark.operate

NGINX_IMAGE, NEW_IMAGE = "localhost/nginx:rollout", "localhost/pid-decode-server:new"
NEW_VERSION = "999.0"
# The official image of nginx also logs to the outputs of the container, and ends with SIGQUIT.
CONTAINERFILES = {
    NGINX_IMAGE: """
        FROM localhost/debian-python
        RUN apt-get update && apt-get install --yes --no-install-recommends nginx-light
        RUN ln -s -f /dev/stderr /var/log/nginx/error.log
        STOPSIGNAL SIGQUIT
        ENTRYPOINT ["nginx", "-g", "daemon off;"]
    """,
    NEW_IMAGE: f"""
        FROM {CPU_IMAGE}
        USER 0:0
        RUN sed -i 's/^__version__ = .*/__version__ = "{NEW_VERSION}"/' engines/__init__.py
        USER 10001:10001
    """,
}
CLASS = RequestClass(name="small", size=Size(64, 64))
LOAD = 0.5  # of the capacity of one server, so that one of them can serve it alone
SLICE = 5.0  # seconds
TIMEOUT = 120.0  # seconds
ENOUGH = 30  # images from each server, old and new


class OneRequestPerConnection(Client):
    """Client without keep-alive."""

    def release(self, connection: Connection) -> None:
        connection.close()


class Load:
    """Requests in an open loop, in a thread, until the block ends."""

    def __init__(self, client: Client, target: Target) -> None:
        """Prepare requests at `LOAD` times the capacity of `target`."""
        self._client, self._target, self._stopping = client, target, threading.Event()
        self._marks: list[tuple[float, str]] = []
        self.outcomes: list[Outcome] = []  # times are those of time.perf_counter

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send requests during the block, then wait for all responses."""
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(asyncio.run, self._send())
            try:
                yield
            finally:
                self.mark("end")
                self._stopping.set()
                sending.result()

    async def _send(self) -> None:
        """Begin a new part of the schedule every `SLICE` seconds, without waiting for the responses to the previous."""
        runs = []
        with closing(self._client):
            generator = Generator(self._client, self._target.capacity, self._target.latents)
            while not self._stopping.is_set():
                scenario = Scenario(
                    title="Rollout", duration=SLICE, seed=len(runs), arrivals=Arrivals(load=LOAD), mix=(CLASS,)
                )
                schedule, began = make_schedule(scenario, self._target.capacity), time.perf_counter()
                runs.append((began, asyncio.create_task(generator.run(schedule, TIMEOUT))))
                await asyncio.sleep(began + SLICE - time.perf_counter())
            for began, run in runs:
                self.outcomes += [replace(outcome, at=began + outcome.at) for outcome in (await run).outcomes]

    def mark(self, name: str) -> None:
        """Begin a phase, for `table`."""
        self._marks.append((time.perf_counter(), name))

    def table(self) -> str:
        """Return the outcomes and latencies of each phase, by the intended send times of the requests."""
        lines = ["| phase | seconds | requests | not 200 | p50 | p99 | maximum |", "| --- |" + " --- |" * 6]
        phases = [(begin, end, name) for (begin, name), (end, _) in pairwise(self._marks)]
        for begin, end, name in [*phases, (self._marks[0][0], self._marks[-1][0] + SLICE, "all")]:
            sent = [outcome for outcome in self.outcomes if begin <= outcome.at < end]
            latencies = [1000 * outcome.latency for outcome in sent if outcome.latency is not None]
            cells = [f"{end - begin:.1f}", len(sent), sum(outcome.status != 200 for outcome in sent)]
            cells += [f"{percentile(latencies, q):.0f} ms" for q in (50, 99, 100)]
            lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


class Cluster:
    """Two servers of the old version behind nginx."""

    def __init__(self, podman: Podman, flags: tuple[str, ...], folder: Path, stack: ExitStack) -> None:
        self._podman, self._stack = podman, stack
        self._flags = (*flags, "--network", stack.enter_context(podman.network("rollout")))
        first = self._start(CPU_IMAGE)
        _keep_mac_address(podman.inspect("network", "rollout")["network_interface"])
        self.servers = [first, self._start(CPU_IMAGE)]
        self._site = folder / "decoders.conf"
        self._configure()
        volume = ("--volume", f"{self._site}:/etc/nginx/conf.d/decoders.conf:ro")
        self._nginx = stack.enter_context(podman.container(*self._flags[-2:], *volume, image=NGINX_IMAGE))
        self.url = self._nginx.url
        until(lambda: responds(f"{self.url}/info"), "nginx")

    def _start(self, image: str, *flags: str) -> Container:
        container = self._stack.enter_context(self._podman.container(*self._flags, *flags, image=image))
        container.wait_until_ready()
        return container

    def _configure(self) -> None:
        """Write the shipped site with the addresses of the servers."""
        site = (ROOT / "docker/nginx/decoders.conf").read_text()
        addresses = [f"server {server.address}:{PORT} " for server in self.servers]
        shipped = ["server 127.0.0.1:8001 ", "server 127.0.0.1:8002 ", "listen 127.0.0.1:8000;"]
        for old, new in zip(shipped, [*addresses, f"listen {PORT};"], strict=True):
            assert site.count(old) == 1
            site = site.replace(old, new)
        self._site.write_text(site)

    def stop_first(self, number: int, load: Load) -> None:
        """Stop an old server, then start a new one with the same addresses; nginx keeps its configuration."""
        old = self.servers[number]
        (network,) = self._podman.inspect("container", old.name)["NetworkSettings"]["Networks"].values()
        # With another MAC address, nginx would not reach the new server until its ARP entry of the old one expires.
        addresses = ("--ip", network["IPAddress"], "--mac-address", network["MacAddress"])
        load.mark(f"server {number + 1} stops")
        assert old.stop() == 0
        load.mark(f"new server {number + 1} starts")
        self.servers[number] = self._start(NEW_IMAGE, *addresses)
        load.mark("2 servers")

    def start_first(self, number: int, load: Load) -> None:
        """Start a new server, replace the address of the old one in nginx's configuration, then stop the old one."""
        old = self.servers[number]
        load.mark(f"new server {number + 1} starts")
        self.servers[number] = self._start(NEW_IMAGE)
        self._configure()
        load.mark(f"reload, server {number + 1} stops")
        self._nginx.run("nginx", "-s", "reload")
        assert old.stop() == 0
        load.mark("2 servers")


def _keep_mac_address(bridge: str) -> None:
    """Set the MAC address of a bridge to the present one.

    Otherwise it changes with the containers, unless netavark has set it (1.4 does not). The host, from which the load
    comes, would then not get the packets of a container that has the previous address in its ARP table.
    """
    run("ip", "link", "set", "dev", bridge, "address", Path(f"/sys/class/net/{bridge}/address").read_text().strip())


@pytest.fixture(scope="module")
def images(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Build nginx and the new version of the server."""
    for image, text in CONTAINERFILES.items():
        file = tmp_path_factory.mktemp("image") / "Containerfile"
        file.write_text(text)
        podman("build", "--isolation", "chroot", "--file", file, "--tag", image, file.parent)


@pytest.fixture(scope="module")
def flags(podman: Podman, images: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a server with a bundle for small images, so that a few cores serve many of them."""
    bundles, cache = (tmp_path_factory.mktemp(name) for name in ("bundles", "cache"))
    for path in (bundles, cache):
        os.chown(path, 10001, 10001)
    volumes = ("--volume", f"{bundles}:/bundles", "--volume", f"{cache}:/cache")
    build = ("build_engines.py", "--decoder", "dct-demo", "--target", "cpu", "--sizes", CLASS.size)
    output = ("--output", "/bundles/small")
    podman("run", "--rm", *CONFINED, *volumes, "--entrypoint", "python", CPU_IMAGE, *build, *output)
    # The queue is long, so that no request is rejected if other programs slow the server down.
    return (*CONFINED, *volumes, "--env", "PID_BUNDLE=/bundles/small", "--env", "PID_QUEUE_IMAGES=1000")


def version(server: Container) -> str:
    return str(httpx.get(f"{server.url}/version").json()["version"])


def images_served(server: Container) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == "pid_images_total")


@pytest.mark.parametrize(
    ("order", "client"),
    [
        pytest.param(Cluster.stop_first, Client, id="stop first"),
        # A reload closes idle connections, and a request that is being sent on one of them fails.
        pytest.param(Cluster.start_first, OneRequestPerConnection, id="start first"),
    ],
)
def test_a_rolling_update_under_load_fails_no_request(
    podman: Podman,
    flags: tuple[str, ...],
    tmp_path: Path,
    order: Callable[[Cluster, int, Load], None],
    client: type[Client],
):
    with ExitStack() as stack:
        cluster = Cluster(podman, flags, tmp_path, stack)
        target = asyncio.run(inspect_server(cluster.servers[0].url))
        assert NEW_VERSION not in map(version, cluster.servers)
        load = Load(client(cluster.url), target)
        with load.running():
            load.mark("before")
            for number, old in enumerate(tuple(cluster.servers)):
                until(lambda old=old: images_served(old) >= ENOUGH, "requests to the old server", 180)
                order(cluster, number, load)
                new = cluster.servers[number]
                until(lambda new=new: images_served(new) >= ENOUGH, "requests to the new server", 180)
        print(f"capacity of a server: {target.capacity.rate((CLASS,)):.1f} requests per second\n{load.table()}")
        assert Counter((sent.kind, sent.status, sent.error) for sent in load.outcomes) == {
            (OutcomeKind.IN_TIME, 200, ""): len(load.outcomes)
        }
        assert [version(server) for server in cluster.servers] == [NEW_VERSION] * 2
