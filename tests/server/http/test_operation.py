"""Health, /info, /metrics, /docs and request ids."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import pytest

from engines.runtime.kernels.choice import Choice, Failed, Measured
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from tests.server.conftest import LARGER, SIZE, Running, Serve, simulated
from tests.waiting import until


def test_a_ready_server_reports_its_decoder(server: Running):
    assert server.client.get("/health/live").json() == {"state": "ready"}
    assert server.client.get("/health/ready").json() == {"state": "ready"}
    info = server.client.get("/info").json()
    (decoder,) = info["decoders"]
    assert decoder["latent_space"]["channels"] == 16
    assert [entry["output"] for entry in decoder["sizes"]] == [list(SIZE), list(LARGER)]
    assert {(cost["stage"], tuple(cost["size"])) for cost in info["costs"]} >= {
        (stage, size) for stage in ("condition", "step", "finish", "encode") for size in (SIZE, LARGER)
    }


def test_info_has_the_measurements_by_which_kernels_were_chosen(serve: Serve):
    class OnGpu(SimulatedRuntime):
        def kernel_choices(self) -> Sequence[Choice]:
            fast, wrong = Measured(0.002, 0.01, correct=True), Measured(0.001, math.nan, correct=False)
            results = {"cuDNN": fast, "Triton": wrong, "flash": Failed("no such architecture")}
            return (Choice("joint attention", "16684 tokens", 10, 10, results),)

    with serve(OnGpu({SIZE: SimulatedCost()})) as running:
        assert running.client.get("/info").json()["decoders"][0]["kernels"] == [
            {
                "operation": "joint attention",
                "shape": "16684 tokens",
                "chosen": "cuDNN",
                "measured": [
                    {"name": "cuDNN", "seconds": 0.002, "error": 0.01},
                    {"name": "Triton", "seconds": 0.001, "error": None},
                    {"name": "flash", "seconds": None, "error": None},
                ],
            }
        ]


def test_the_server_is_not_ready_before_the_warm_up_has_ended(serve: Serve):
    release = threading.Event()

    class SlowToWarmUp(SimulatedRuntime):
        def warm_up(self):
            assert release.wait(60)

    with serve(SlowToWarmUp({SIZE: SimulatedCost()}), wait=False) as running:
        assert running.client.get("/health/live").status_code == 200
        assert running.client.get("/health/ready").status_code == 503
        rejected = running.decode()
        assert (rejected.status_code, rejected.json()["code"]) == (503, "unavailable")
        release.set()
        until(lambda: running.client.get("/health/ready").status_code == 200)
        assert running.decode().status_code == 200


def test_metrics_count_requests_images_and_steps(serve: Serve):
    with serve(simulated()) as running:
        running.decode()
        running.decode(steps=9)
        text = running.client.get("/metrics").text
    for line in (
        'pid_requests_total{code="200",decoder="simulated",protocol="decode"} 1.0',
        'pid_requests_total{code="422",decoder="",protocol="decode"} 1.0',
        'pid_refusals_total{code="invalid-option"} 1.0',
        'pid_images_total{decoder="simulated",format="png"} 1.0',
        'pid_steps_total{decoder="simulated"} 4.0',
        'pid_queue_images{decoder="simulated"} 0.0',
        'pid_stage_seconds_count{decoder="simulated",stage="denoise"} 1.0',
        "pid_requests_in_flight 0.0",
    ):
        assert line in text, line
    assert 'pid_memory_bytes{device="cpu",kind="used"}' in text
    assert 'pid_cost_seconds{batch="1",decoder="simulated",encoding="",size="64x64",stage="step",tile=""}' in text


def test_a_valid_request_id_is_kept_and_an_invalid_one_replaced(server: Running):
    ids = [
        server.client.get("/info", headers={"X-Request-Id": requested}).headers["x-request-id"]
        for requested in ("abc-123", "no spaces please", "x" * 65)
    ]
    assert ids[0] == "abc-123"
    assert all(len(other) == 32 for other in ids[1:])


def test_an_unexpected_exception_is_a_500_with_a_request_id_and_logged_once(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise ValueError("secret")

    with serve() as running:
        monkeypatch.setattr(running.service, "submit", fail)
        response = running.decode()
        assert (response.status_code, response.json()["code"]) == (500, "internal-error")
        assert response.json()["request_id"] == response.headers["x-request-id"]
        assert "secret" not in response.text
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert record.fields["request_id"] == response.headers["x-request-id"]
        series = 'pid_requests_total{code="500",decoder="simulated",protocol="decode"}'
        assert f"{series} 1.0" in running.client.get("/metrics").text


def test_a_draining_server_closes_connections_with_their_response(serve: Serve):
    with serve() as running:
        assert "connection" not in running.client.get("/health/live").headers
        running.service.lifecycle.drain()
        assert running.client.get("/health/live").headers["connection"] == "close"
