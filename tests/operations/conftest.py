"""A real Prometheus that has watched real servers through a short load."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.operations.gpu_server import SIZE
from tests.operations.programs import ROOT, free_port, program, running, until


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without `-m operate` nothing here is so much as imported: its packages need not be installed."""
    return None if config.option.markexpr == "operate" else True


LOAD_SECONDS = 8
SCENARIO = f"""
title = "Short"
duration = {LOAD_SECONDS}
warm_up = 1
[arrivals]
rate = 8
[[mix]]
name = "in time"
size = "{SIZE[0]}x{SIZE[1]}"
[[mix]]
name = "refused"
size = "{SIZE[0]}x{SIZE[1]}"
deadline_ms = 1
[[mix]]
name = "leaving"
size = "{SIZE[0]}x{SIZE[1]}"
images = 2
leaving = 1
"""


@pytest.fixture(scope="session")
def servers(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Two servers by host:port: the bundled decoder on this CPU, and simulated GPUs."""
    folder = tmp_path_factory.mktemp("servers")
    addresses = []
    with contextlib.ExitStack() as stack:
        for name, flags in (("server", ["--bundle", demo_bundle]), ("tests.operations.gpu_server", [])):
            port = free_port()
            command = [sys.executable, "-m", name, *flags, "--port", port, "--drain-delay", "0"]
            stack.enter_context(running(command, folder / f"{name}.log"))
            addresses.append(f"127.0.0.1:{port}")
        for address in addresses:
            until(lambda address=address: answers(f"http://{address}/health/ready"), f"{address} to be ready")
        yield tuple(addresses)


@pytest.fixture(scope="session")
def prometheus(servers: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus with the project's rules, after a load on both servers."""
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    listen = f"--web.listen-address=127.0.0.1:{port}"
    command = [program("prometheus"), f"--config.file={configuration(folder, servers)}", listen]
    with running([*command, f"--storage.tsdb.path={folder / 'data'}"], folder / "log"):
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/-/ready"), "Prometheus to be ready")
        until(lambda: len(samples(url, "up == 1")) == len(servers), "both servers to be scraped")
        load(servers, folder)
        until(lambda: bool(samples(url, "job:pid_deadline_burn:rate6h")), "the rules to have had something")
        until(lambda: bool(samples(url, "job:pid_device_busy:ratio_rate5m")), "the rules that take from others")
        yield url


def configuration(folder: Path, servers: tuple[str, ...]) -> Path:
    """The one that ships, faster, and with these servers for the containers'."""
    source = ROOT / "docker/prometheus/prometheus.yml"
    config = yaml.safe_load(source.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(source.parent / name) for name in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [{"targets": list(servers)}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def load(servers: tuple[str, ...], folder: Path) -> None:
    scenario = folder / "short.toml"
    scenario.write_text(SCENARIO)
    runs = []
    for number, address in enumerate(servers):
        command = [sys.executable, "-m", "loadtest", "--url", f"http://{address}", "--scenario", str(scenario)]
        output = ["--output", str(folder / f"load-{number}")]
        runs.append(subprocess.Popen([*command, *output], cwd=ROOT, stdout=subprocess.DEVNULL))
    assert [process.wait(120) for process in runs] == [0, 0]


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def samples(url: str, query: str) -> list[dict[str, object]]:
    """The series that Prometheus has for `query` now."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=20).json()
    assert answer["status"] == "success", f"{query}: {answer.get('error')}"
    result: list[dict[str, object]] = answer["data"]["result"]
    return result
