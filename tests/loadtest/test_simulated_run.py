"""A short run against a server on simulated devices, from the command line to the report."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from engines.errors import ConfigError
from engines.runtime.protocol import Sample
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.__main__ import main
from loadtest.benchmarks.http_overhead import serving
from loadtest.keys import create_keys
from loadtest.processes import nginx
from loadtest.report import Report
from loadtest.runner import run_scenario
from loadtest.scenario import Arrivals, RequestClass, Scenario, Threshold
from loadtest.simulated_server import PreEncoder
from loadtest.simulated_server import main as simulated_server
from loadtest.target import inspect_server
from server.images import png
from server.images.encoder import Encoding
from server.lifecycle import State
from server.scheduling.costs import Output
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
    png.warm_up()  # compiles the kernels if no cache has them
    costs = {SIZE: SimulatedCost(0.001, 0.002, 0.001), LARGE: SimulatedCost(0.001, 0.01, 0.001)}
    runtimes = {"simulated": {"simulated:0": SimulatedRuntime(costs)}}
    service = DecodeService(Settings(bundle=Path(), encoder_threads=1), runtimes)
    with serving(service) as port:
        assert service.lifecycle.state is State.READY
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def report(url: str) -> Report:
    """The report of two seconds with two sizes, batches, a deadline, disconnecting clients and slow readers."""
    mix = (
        RequestClass(name="small", size=SIZE, share=4, deadline_ms=20_000),
        RequestClass(name="large", size=LARGE, disconnect_share=0.3),
        RequestClass(name="three", size=SIZE, images=3, disconnect_share=0.3, disconnect_phase="streaming"),
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
        return await run_scenario(scenario, await inspect_server(url))

    return asyncio.run(test())


class TestReport:
    def test_every_request_is_accounted_for(self, report: Report):
        total = report.summary.total
        assert len(report.run.outcomes) == len(report.run.schedule.arrivals)
        assert total.sent == total.in_time + total.late + total.rejected + total.disconnected + total.errors
        assert report.summary.errors == {}
        assert report.summary.passed

    def test_the_metrics_of_the_server_were_scraped(self, report: Report):
        assert report.samples[-1].images > 0
        assert report.samples[-1].memory_bytes > 0

    def test_the_table_has_every_class_and_the_cost_of_the_generator(self, report: Report):
        table = report.table()
        assert all(f"\n{name} " in table for name in ("small", "large", "three", "slow", "all"))
        assert "generator:" in table
        assert "pass  errors <= 0" in table

    def test_the_files_are_self_contained(self, report: Report, tmp_path: Path):
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

    def test_the_document_keeps_the_published_keys(self, report: Report):
        document = report.document()
        assert document["summary"]["total"].keys() == {
            *("name", "sent", "in_time", "late", "refused", "left", "errors"),
            *("latency_ms", "overrun_max_ms", "refusal_p99_ms", "goodput"),
        }
        assert document["summary"]["total"]["latency_ms"].keys() == {"50.0", "90.0", "99.0", "99.9"}
        assert {"against", "load_average", "passed", "faults", "outcomes", "samples"} < document.keys()
        kinds = {outcome["kind"] for outcome in document["outcomes"]}
        assert {"in time", "left"} <= kinds <= {"in time", "late", "refused", "left", "error"}

    def test_without_matplotlib_the_page_has_no_plots(self, report: Report, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("loadtest.plots.figure", missing)
        assert [path.name for path in report.write(tmp_path)] == ["report.json", "report.html"]
        assert "need matplotlib" in (tmp_path / "report.html").read_text()


def missing(*arguments: object) -> bytes:
    raise ImportError("matplotlib")


class TestCommandLine:
    @pytest.mark.parametrize(("bound", "status"), [("at_most = 60000", 0), ("at_most = 0.001", 1)])
    def test_the_exit_status_is_1_if_a_threshold_fails(self, url: str, tmp_path: Path, bound: str, status: int):
        path = tmp_path / "short.toml"
        path.write_text(SCENARIO + bound)
        arguments = ["--url", url, "--scenario", str(path), "--duration", "0.5", "--output", str(tmp_path)]
        assert main(arguments) == status

    def test_a_simulated_server_with_a_text_encoder_is_started_and_tested(self, small_table: Path, tmp_path: Path):
        flags = 'flags = ["--simulated-caption-seconds", "0.01", "--simulated-caption-batch", "2"]\n'
        prompts = '[[mix]]\nname = "prompts"\nsize = "64x64"\nshare = 6\nnew_prompts = 0.5\n'
        path = tmp_path / "short.toml"
        path.write_text(flags + SCENARIO.replace("[[thresholds]]", prompts + "[[thresholds]]", 1) + "at_most = 60000")
        arguments = ["--simulate", str(small_table), "--scenario", str(path), "--duration", "0.5"]
        assert main([*arguments, "--output", str(tmp_path)]) == 0
        document = json.loads((tmp_path / "report.json").read_text())
        assert document["against"] == "small (simulated)"
        assert 0 < document["summary"]["measures"]["cached_prompts"] < 1

    def test_a_simulated_server_gets_the_decoders_of_the_scenario(self, small_table: Path, tmp_path: Path):
        """Both decoders support the latents of both classes, so each request has to name its decoder."""
        decoders = "".join(f'[[decoders]]\nname = "{name}"\nlatent_channels = 16\n' for name in ("one", "two"))
        mix = '[[mix]]\nname = "second"\nsize = "64x64"\ndecoder = "two"\n'
        path = tmp_path / "short.toml"
        sections = f'decoder = "one"\n{mix}{decoders}[[thresholds]]'
        path.write_text(SCENARIO.replace("[[thresholds]]", sections, 1) + "at_most = 60000")
        arguments = ["--simulate", str(small_table), "--scenario", str(path), "--duration", "1"]
        assert main([*arguments, "--output", str(tmp_path)]) == 0
        outcomes = json.loads((tmp_path / "report.json").read_text())["outcomes"]
        assert {(outcome["name"], outcome["status"]) for outcome in outcomes} == {("small", 200), ("second", 200)}

    def test_a_simulated_server_gets_the_keys_of_the_scenario_and_is_paused(self, small_table: Path, tmp_path: Path):
        pause = "[[pauses]]\nat = 0.5\nseconds = 0.75\n"
        loop = '[[mix]]\nname = "loop"\nsize = "64x64"\nkey = "two"\nclients = 2\n'
        threshold = '[[thresholds]]\nmeasure = "errors"\nsince = 1.5\nat_most = 0\n'
        path = tmp_path / "short.toml"
        path.write_text(SCENARIO.partition("[[thresholds]]")[0] + 'key = "one"\n' + loop + pause + threshold)
        assert main(["--simulate", str(small_table), "--scenario", str(path), "--output", str(tmp_path)]) == 0
        outcomes = json.loads((tmp_path / "report.json").read_text())["outcomes"]
        assert {outcome["name"] for outcome in outcomes} == {"small", "loop"}
        assert {outcome["status"] for outcome in outcomes} == {200}
        during = [outcome for outcome in outcomes if 0.8 <= outcome["at"] < 1.0]
        assert during
        assert all(outcome["at"] + outcome["latency"] >= 1.2 for outcome in during)

    def test_the_keys_of_a_running_server_are_read_from_a_file(self, tmp_path: Path):
        keys = tmp_path / "keys"
        create_keys(keys, ("one",))
        path = tmp_path / "short.toml"
        path.write_text(SCENARIO + "at_most = 60000")
        settings = Settings(bundle=Path(), encoder_threads=1, api_keys=keys)
        service = DecodeService(settings, {"simulated": {"simulated:0": SimulatedRuntime({SIZE: SimulatedCost()})}})
        with serving(service) as port:
            arguments = ["--url", f"http://127.0.0.1:{port}", "--scenario", str(path), "--duration", "0.5"]
            arguments += ["--output", str(tmp_path)]
            assert main([*arguments, "--api-keys", str(keys)]) == 0
            assert main(arguments) == 2

    def test_simulated_servers_do_not_need_a_key_file(self, tmp_path: Path, capsys):
        arguments = ["--simulate", "zero", "--scenario", "greedy-key", "--api-keys", "keys", "--output", str(tmp_path)]
        assert main(arguments) == 2
        assert "--api-keys is for a server at --url" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("scenario", "message"),
        [
            ("nowhere.toml", "Cannot read the scenario"),
            ("rolling-restart", "--simulate"),
            ("faults", "--simulate"),
            ("pause", "--simulate"),
            ("steady", "No decode server responds"),
        ],
    )
    def test_the_exit_status_is_2_if_the_run_is_impossible(self, scenario: str, message: str, tmp_path: Path, capsys):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        arguments = ["--url", f"http://127.0.0.1:{port}", "--scenario", scenario, "--output", str(tmp_path)]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("flag", ["--simulated-caption-seconds=-1", "--simulated-caption-batch=0"])
    def test_a_text_encoder_that_is_impossible_to_simulate_is_rejected(self, flag: str, capfd):
        assert simulated_server(["--table", "zero", flag]) == 2
        assert flag.partition("=")[0] in capfd.readouterr().err

    def test_an_unknown_table_is_named(self, tmp_path: Path, capsys):
        assert main(["--simulate", "abacus", "--scenario", "steady", "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "abacus" in error
        assert error.count("\n") == 1


def test_costs_and_latents_of_a_running_server_are_those_of_each_decoder():
    runtimes = {
        "flux": {"device": SimulatedRuntime({SIZE: SimulatedCost()}, latent_channels=16)},
        "sdxl": {"device": SimulatedRuntime({SIZE: SimulatedCost(), LARGE: SimulatedCost()}, latent_channels=4)},
    }
    service = DecodeService(Settings(bundle=Path(), encoder_threads=1), runtimes)
    with serving(service) as port:
        target = asyncio.run(inspect_server(f"http://127.0.0.1:{port}"))
    outputs = {Output("flux", SIZE): (16, 2, 2), Output("sdxl", SIZE): (4, 2, 2), Output("sdxl", LARGE): (4, 4, 4)}
    assert target.latents == outputs
    assert target.capacity.costs.keys() == outputs.keys()


def test_a_pre_encoded_png_holds_the_pixels_of_the_image():
    runtime = SimulatedRuntime({SIZE: SimulatedCost()})
    rows = runtime.finish(runtime.start(Sample(None, SIZE)))  # type: ignore[arg-type]  # the latent is not read
    received: list[bytes] = []

    class Stream:
        push = staticmethod(received.append)
        end = staticmethod(lambda: received.append(b""))

    with contextlib.closing(PreEncoder(1)) as encoder:
        encoder.encode(rows, Stream(), Encoding())  # type: ignore[arg-type]
    with Image.open(io.BytesIO(b"".join(received))) as image:
        assert image.size == SIZE
        assert image.tobytes() == rows.pixels.tobytes()


def test_a_service_becomes_ready_with_the_pre_encoder():
    runtimes = {"simulated": {"device": SimulatedRuntime({SIZE: SimulatedCost()})}}
    service = DecodeService(Settings(bundle=Path()), runtimes, encoder_factory=PreEncoder)
    with serving(service):
        assert service.lifecycle.state is State.READY


def test_a_missing_nginx_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)

    async def start() -> None:
        async with nginx([], tmp_path):
            pass

    with pytest.raises(ConfigError, match="apt-get install nginx-light"):
        asyncio.run(start())
