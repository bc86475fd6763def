"""The whole way: a simulated server in this process, a short run against it, and the report of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from engines.errors import ConfigError
from engines.runtime.protocol import Sample
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.__main__ import inspect, main, run_scenario
from loadtest.processes import nginx
from loadtest.report import Report
from loadtest.scenario import Arrivals, RequestClass, Scenario, Threshold
from loadtest.simulated_server import PreEncoder
from server.http.app import create_app
from server.images import png
from server.images.encoder import Encoding
from server.lifecycle import State
from server.service import DecodeService
from server.settings import Settings

SIZE, LARGE = Size(64, 64), Size(128, 128)
SCENARIO = """
title = "Short"
duration = 2
warm_up = 0.2
[arrivals]
rate = 20
[[mix]]
name = "small"
size = "64x64"
[[thresholds]]
measure = "errors"
at_most = 0
[[thresholds]]
measure = "p99_ms"
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    png.warm_up()  # compiles where there is no cache yet
    costs = {SIZE: SimulatedCost(0.001, 0.002, 0.001), LARGE: SimulatedCost(0.001, 0.01, 0.001)}
    service = DecodeService(Settings(bundle=Path(), encoder_threads=1), {"simulated:0": SimulatedRuntime(costs)})
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, access_log=False))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    limit = time.monotonic() + 30
    while not server.started or service.lifecycle.state is not State.READY:
        assert time.monotonic() < limit, "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def report(url: str) -> Report:
    """Two seconds of everything at once: two sizes, batches, a deadline, leavers, slow readers."""
    mix = (
        RequestClass(name="small", size=SIZE, share=4, deadline_ms=20_000),
        RequestClass(name="large", size=LARGE, leaving=0.3),
        RequestClass(name="three", size=SIZE, images=3, leaving=0.3, leaves="streaming"),
        RequestClass(name="slow", size=SIZE, read_rate=1e6),
    )
    thresholds = (Threshold(measure="errors", at_most=0), Threshold(measure="answered", at_least=1))
    arrivals = Arrivals(rate=30)
    scenario = Scenario(
        title="Everything <at once>",
        duration=2,
        warm_up=0.2,
        arrivals=arrivals,
        mix=mix,
        baseline=True,
        thresholds=thresholds,
    )

    async def test() -> Report:
        return await run_scenario(scenario, await inspect(url))

    return asyncio.run(test())


class TestReport:
    def test_every_request_is_accounted_for(self, report: Report):
        total = report.summary.total
        assert len(report.run.outcomes) == len(report.run.plan.arrivals)
        assert total.sent == total.in_time + total.late + total.refused + total.left + total.errors
        assert report.summary.errors == {}
        assert report.summary.passed

    def test_the_servers_own_numbers_were_read(self, report: Report):
        assert report.samples[-1].images > 0
        assert report.samples[-1].memory_bytes > 0

    def test_the_table_names_every_class_and_the_generators_cost(self, report: Report):
        table = report.table()
        assert all(f"\n{name} " in table for name in ("small", "large", "three", "slow", "all"))
        assert "generator:" in table
        assert "pass  errors <= 0" in table

    def test_the_files_stand_alone(self, report: Report, tmp_path: Path):
        report.write(tmp_path)
        document = json.loads((tmp_path / "report.json").read_text())
        assert document["passed"] is True
        assert len(document["outcomes"]) == len(report.run.outcomes)
        page = (tmp_path / "report.html").read_text()
        assert not re.search(r"<script|<link|<iframe|url\(|@import|srcset|href", page)
        assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
        assert "Everything &lt;at once&gt;" in page
        with Image.open(tmp_path / "report.png") as image:
            image.load()
            assert image.width > 500

    def test_without_matplotlib_there_is_a_page_without_plots(self, report: Report, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("loadtest.plots.figure", missing)
        assert [path.name for path in report.write(tmp_path)] == ["report.json", "report.html"]
        assert "need matplotlib" in (tmp_path / "report.html").read_text()


def missing(*arguments: object) -> bytes:
    raise ImportError("matplotlib")


class TestCommandLine:
    @pytest.mark.parametrize(("bound", "status"), [("at_most = 60000", 0), ("at_most = 0.001", 1)])
    def test_the_exit_status_says_whether_thresholds_hold(self, url: str, tmp_path: Path, bound: str, status: int):
        path = tmp_path / "short.toml"
        path.write_text(SCENARIO + bound)
        arguments = ["--url", url, "--scenario", str(path), "--duration", "0.5", "--output", str(tmp_path)]
        assert main(arguments) == status

    @pytest.mark.parametrize(
        ("scenario", "sentence"),
        [
            ("nowhere.toml", "cannot be read"),
            ("rolling-restart", "--simulate"),
            ("faults", "--simulate"),
            ("steady", "no decode server"),
        ],
    )
    def test_a_run_that_cannot_be_ends_with_a_sentence(self, scenario: str, sentence: str, tmp_path: Path, capsys):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        arguments = ["--url", f"http://127.0.0.1:{port}", "--scenario", scenario, "--output", str(tmp_path)]
        assert main(arguments) == 2
        assert sentence in capsys.readouterr().err

    def test_an_unknown_table_is_one_sentence(self, tmp_path: Path, capsys):
        assert main(["--simulate", "abacus", "--scenario", "steady", "--output", str(tmp_path)]) == 2
        assert "abacus cannot be read" in capsys.readouterr().err


def test_a_pre_encoded_answer_is_the_picture():
    runtime = SimulatedRuntime({SIZE: SimulatedCost()})
    rows = runtime.finish(runtime.start(Sample(None, SIZE)))  # type: ignore[arg-type]  # nothing looks at the latent
    received: list[bytes] = []

    class Received:
        push = staticmethod(received.append)
        end = staticmethod(lambda: received.append(b""))

    with contextlib.closing(PreEncoder(1)) as encoder:
        encoder.encode(rows, Received(), Encoding())  # type: ignore[arg-type]
    with Image.open(io.BytesIO(b"".join(received))) as image:
        assert image.size == SIZE
        assert image.tobytes() == rows.pixels.tobytes()


def test_the_pre_encoder_takes_the_encoders_place_in_a_service(monkeypatch):
    monkeypatch.setattr("server.service.Encoder", PreEncoder)
    service = DecodeService(Settings(bundle=Path()), {"device": SimulatedRuntime({SIZE: SimulatedCost()})})
    service.start()
    try:
        until_ready = time.monotonic() + 20
        while service.lifecycle.state is State.STARTING:
            assert time.monotonic() < until_ready, "waited too long"
            time.sleep(0.01)
        assert service.lifecycle.state is State.READY
    finally:
        service.stop()


def test_nginx_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)

    async def start() -> None:
        async with nginx([], tmp_path):
            pass

    with pytest.raises(ConfigError, match="apt-get install nginx-light"):
        asyncio.run(start())
