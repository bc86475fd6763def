"""The server on this device: start, one request, memory, and a load test.

The server and the load test are started as an operator starts them, as separate programs, and measured over HTTP.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Value
from engines.benchmark.gpu_check.memory import device_bytes_in_use, mebibytes, process_bytes
from engines.benchmark.gpu_check.programs import run_program
from engines.benchmark.gpu_check.rows import milliseconds
from engines.benchmark.gpu_check.serving_bundle import write_random_bundle
from engines.errors import ConfigError

REQUESTS = 5  # timed requests, one after another
LOAD_SECONDS = 60.0
MIN_LOAD_SECONDS = 10.0  # a shorter load test says nothing
_STOP_SECONDS = 10.0  # for the end of the load test and the report
_POLL_SECONDS = 0.2

_OPENER = build_opener(ProxyHandler({}))  # the server is on this machine, whatever HTTP_PROXY says
_SCENARIO = """\
title = "Steady"
about = "{size} at half of the capacity."
warm_up = {warm_up}

[arrivals]
process = "poisson"
load = 0.5

[[mix]]
name = "main"
size = "{size}"

[[thresholds]]
measure = "errors"
at_most = 0
"""


def measure_server(config: RunConfig) -> Iterator[Finding]:
    """Build a bundle in FP8, serve it, and yield one row per property that was measured."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        started = time.monotonic()
        _write_bundle(config, bundle)
        yield _row("bundle with random weights, FP8, s", round(time.monotonic() - started, 1))
        if config.on_cuda and (in_use := device_bytes_in_use(config.device)) is not None:
            yield _row("memory of the device by NVML, before the server starts, MiB", mebibytes(in_use))
        port = _free_port()
        with _server(config, bundle, port) as wait_until_ready:
            yield _row("start until ready, with the warm-up, s", round(wait_until_ready(), 1))
            url = f"http://127.0.0.1:{port}"
            yield from _requests(config, url)
            yield from _memory(config, url, "after the requests")
            yield from _load(config, url, Path(folder))
            yield from _memory(config, url, "after the load")


def _write_bundle(config: RunConfig, path: Path) -> None:
    """Write the bundle in a separate process, so that this one uses no memory on the device."""
    process = get_context("spawn").Process(target=write_random_bundle, args=(config, "fp8", path))
    process.start()
    process.join()
    if process.exitcode:
        raise ConfigError(f"Writing the bundle failed with status {process.exitcode}, see the log.")


def _row(name: str, value: Value) -> Measurement:
    return Measurement({"property": name, "value": value})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _server(config: RunConfig, bundle: Path, port: int) -> Iterator[Callable[[], float]]:
    """Run the server during the block; yields a function that waits until it is ready and returns the seconds."""
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", str(port)]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--devices", str(config.device)])  # noqa: S603

    def wait_until_ready() -> float:
        while config.seconds_left > 0:
            if process.poll() is not None:
                raise ConfigError(f"The server exited with status {process.returncode}, see the log.")
            try:
                _get(f"http://127.0.0.1:{port}/health/ready")
            except OSError:
                time.sleep(_POLL_SECONDS)
            else:
                return time.monotonic() - started
        raise ConfigError("The server was not ready in time, see the log.")

    try:
        yield wait_until_ready
    finally:
        process.kill()
        process.wait()


def _get(url: str) -> bytes:
    with _OPENER.open(url, timeout=10) as response:
        body: bytes = response.read()
        return body


def _requests(config: RunConfig, url: str) -> Iterator[Finding]:
    """Decode random latents one after another."""
    network = config.description.config
    shape = (network.latent_channels, *network.latent_size(config.main_size))
    latent = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    query = f"dtype=float16&shape={','.join(map(str, shape))}&seed=1"
    headers = {"Content-Type": "application/octet-stream"}
    seconds: list[float] = []
    size = 0
    for _ in range(REQUESTS):
        request = Request(f"{url}/decode?{query}", latent.tobytes(), headers)  # noqa: S310  always http
        started = time.perf_counter()
        with _OPENER.open(request, timeout=max(1.0, config.seconds_left)) as response:
            size = len(response.read())
        seconds.append(time.perf_counter() - started)
    yield _row(f"POST /decode, {config.main_size} to a PNG of {size / 1e6:.1f} MB, first, ms", milliseconds(seconds[0]))
    yield _row(f"the same, fastest of {REQUESTS}, ms", milliseconds(min(seconds)))
    for cost in json.loads(_get(f"{url}/info"))["costs"]:
        stage = " ".join(filter(None, (cost["stage"], cost["encoding"])))
        yield _row(f"cost that the server measured: {stage}, ms", milliseconds(cost["seconds"]))


def _memory(config: RunConfig, url: str, when: str) -> Iterator[Finding]:
    """Report the gauges of memory of the server; on a GPU they are those of NVML."""
    metrics = _get(f"{url}/metrics").decode()
    for device, kind, value in re.findall(r'^pid_memory_bytes\{device="(.+?)",kind="(.+?)"\} (\S+)', metrics, re.M):
        yield _row(f"memory of {device}, {kind}, {when}, MiB", mebibytes(float(value)))
    if config.on_cuda:
        for process_id, count in process_bytes(config.device).items():
            yield _row(f"memory of process {process_id} by NVML, {when}, MiB", mebibytes(count))


def _load(config: RunConfig, url: str, folder: Path) -> Iterator[Finding]:
    """Send requests at half of the capacity for a minute, or as long as the part's time allows."""
    duration = min(LOAD_SECONDS, config.seconds_left - _STOP_SECONDS)
    if config.small:
        duration = min(duration, 3.0)
    elif duration < MIN_LOAD_SECONDS:
        yield Note(f"no load test: only {max(0.0, duration):.0f} s were left for it")
        return
    scenario = folder / "steady.toml"
    scenario.write_text(_SCENARIO.format(size=config.main_size, warm_up=0 if config.small else 2))
    command = [sys.executable, "-m", "loadtest", "--url", url, "--scenario", str(scenario)]
    command += ["--duration", f"{duration:.0f}", "--output", str(folder / "report")]
    code = run_program(command, duration + _STOP_SECONDS, os.environ | {"NO_PROXY": "*"})
    document = folder / "report" / "report.json"
    if not document.is_file():
        yield Failed(f"the load test wrote no report (exit status {code}), see the log")
        return
    yield from _summary(json.loads(document.read_text())["summary"], duration)


def _summary(summary: dict[str, Any], duration: float) -> Iterator[Finding]:
    total, measures = summary["total"], summary["measures"]
    yield _row(f"load test, {duration:.0f} s: requests sent", total["sent"])
    for name, key in (("on time", "in_time"), ("late", "late"), ("rejected", "refused"), ("errors", "errors")):
        yield _row(f"load test: {name}", total[key])
    for percentile in ("50.0", "90.0", "99.0"):
        yield _row(f"load test: p{percentile.partition('.')[0]}, ms", total["latency_ms"][percentile])
    for name in ("goodput_of_capacity", "server_cpu", "lag_p99_ms"):
        yield _row(f"load test: {name}", measures[name])
    if total["errors"]:
        yield Failed(f"{total['errors']} requests of the load test failed: {summary['errors']}")
