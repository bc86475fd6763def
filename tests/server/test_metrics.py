"""Metrics: each outcome is counted once, all series exist from the start, devices keep their names."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save

from engines import __version__
from engines.errors import DecodeError
from engines.runtime.protocol import Runtime
from engines.runtime.simulated import SimulatedCost
from server.decoders import Runtimes
from server.images.formats import OUTPUT_FORMATS
from tests.server.conftest import SIZE, Running, Serve, connect_and_disconnect, make_latent, simulated
from tests.server.runtimes import ControlledRuntime, LateRowsRuntime, NonFiniteRuntime
from tests.waiting import until

CODES = ("200", "422", "429")
IMAGES = ("pid_queue_images", "pid_running_images", "pid_encoding_images")


def value(running: Running, name: str, **labels: str) -> float:
    """Return the only sample with this name and these labels."""
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    (found,) = [s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    return found


def outcomes(running: Running) -> dict[str, float]:
    kinds = ("in-time", "late", "failed", "abandoned", "invalid")
    return {kind: value(running, "pid_image_outcomes_total", outcome=kind) for kind in kinds}


def by_decoder(running: Running, name: str, **labels: str) -> dict[str, float]:
    """Return the samples with this name and these labels, one per decoder."""
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    found = [s for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    values = {s.labels["decoder"]: s.value for s in found}
    assert len(values) == len(found)
    return values


def two_decoders(first: Runtime | None = None) -> Runtimes:
    """Return the runtimes of the decoders a, with 16 channels, and b, with 4, on one device."""
    second = simulated(costs={SIZE: SimulatedCost(step=0.001)}, latent_channels=4)
    return {"a": {"device": first or simulated()}, "b": {"device": second}}


class TestOutcomes:
    def test_all_series_exist_before_the_first_image(self, serve: Serve):
        with serve() as running:
            assert set(outcomes(running).values()) == {0}
            assert value(running, "pid_refusals_total", code="queue-full") == 0
            for decoder in ("simulated", ""):
                assert value(running, "pid_requests_total", code="504", protocol="decode", decoder=decoder) == 0
            assert value(running, "pid_stage_seconds_count", stage="encode") == 0
            assert {value(running, "pid_images_total", format=name) for name in OUTPUT_FORMATS} == {0}
            assert value(running, "pid_bundle_swap_seconds", decoder="simulated") == 0

    def test_formats_with_the_same_media_type_are_counted_separately(self, serve: Serve):
        with serve() as running:
            for name, count in (("raw", 2), ("jpg", 1)):
                for _ in range(count):
                    assert running.decode(format=name).status_code == 200
            counts = {name: value(running, "pid_images_total", format=name) for name in OUTPUT_FORMATS}
            assert {name: count for name, count in counts.items() if count} == {"raw": 2, "jpeg": 1}

    def test_no_series_has_the_time_of_its_creation(self, serve: Serve):
        with serve() as running:
            assert running.decode().status_code == 200
            lines = running.client.get("/metrics").text.splitlines()
        names = {line.partition("{")[0].partition(" ")[0] for line in lines}
        assert "pid_requests_total" in names
        assert not [name for name in names if name.endswith("_created")]

    def test_images_are_counted_and_rejected_requests_are_not(self, serve: Serve):
        with serve(max_images=3) as running:
            assert running.decode().status_code == 200
            assert running.decode(steps=9).status_code == 422
            assert outcomes(running) == {"in-time": 1, "late": 0, "failed": 0, "abandoned": 0, "invalid": 0}

    def test_the_time_of_a_request_is_counted_by_its_status(self, serve: Serve):
        with serve() as running:
            assert running.decode().status_code == 200
            assert [running.decode(steps=9).status_code for _ in range(2)] == [422, 422]
            rejected = {code: value(running, "pid_request_seconds_count", code=code, decoder="") for code in CODES}
            known = {
                code: value(running, "pid_request_seconds_count", code=code, decoder="simulated") for code in CODES
            }
            assert rejected == {"200": 0, "422": 2, "429": 0}
            assert known == {"200": 1, "422": 0, "429": 0}

    def test_failed_late_and_abandoned_images_are_counted_separately(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(runtime) as running, ThreadPoolExecutor(1) as pool:
            runtime.error = DecodeError("This step failed.")
            assert running.decode().status_code == 500
            runtime.error = None
            runtime.pause()
            late = pool.submit(running.decode, deadline_ms=50)
            until(lambda: value(running, "pid_running_images") == 1)
            time.sleep(0.1)  # its deadline passes
            runtime.resume()
            assert late.result().status_code == 504
            assert outcomes(running) == {"in-time": 0, "late": 1, "failed": 1, "abandoned": 0, "invalid": 0}
            runtime.pause()
            connect_and_disconnect(running, after=lambda: runtime.entered.wait(60))
            until(lambda: running.service.undelivered.requests == 0)
            runtime.resume()
            until(lambda: outcomes(running)["abandoned"] == 1)

    @pytest.mark.parametrize(
        ("latent", "caption", "status", "code", "outcome"),
        [
            (1001.0, 1.0, 422, "extreme-values", "invalid"),
            (-1e10, 1.0, 422, "extreme-values", "invalid"),
            (1.0, 1e6, 422, "extreme-values", "invalid"),
            (1000.0, 1e5, 500, "decode-failed", "failed"),
        ],
    )
    @pytest.mark.parametrize("image_format", ["png", "webp"])
    def test_nan_in_an_image_is_the_clients_fault_only_if_its_values_were_extreme(
        self, serve: Serve, latent: float, caption: float, status: int, code: str, outcome: str, image_format: str
    ):
        runtime = NonFiniteRuntime({SIZE: SimulatedCost()})
        with serve(runtime) as running:
            runtime.finite = False
            tensors = {"latent": torch.full((16, 2, 2), latent), "caption": torch.full((300, 2304), caption)}
            headers = {"Content-Type": "application/x-safetensors"}
            response = running.client.post(f"/decode?format={image_format}", content=save(tensors), headers=headers)
            assert (response.status_code, response.json()["code"]) == (status, code)
            assert outcomes(running) == {kind: float(kind == outcome) for kind in outcomes(running)}


class TestDevices:
    def test_an_overdue_step_is_visible_while_it_runs(self, serve: Serve):
        runtime = ControlledRuntime({SIZE: SimulatedCost()})
        with serve({"a": runtime}) as running, ThreadPoolExecutor(1) as pool:
            assert value(running, "pid_step_overdue_seconds", device="a") == 0
            runtime.pause()
            response = pool.submit(running.decode)
            until(lambda: value(running, "pid_step_overdue_seconds", device="a") > 0.05)
            runtime.resume()
            assert response.result().status_code == 200
            until(lambda: value(running, "pid_step_overdue_seconds", device="a") == 0)
            assert value(running, "pid_device_busy_seconds_total", device="a") > 0.05


class TestDecoders:
    """Two decoders with different latents on one device, which runs one step at a time."""

    def test_all_series_exist_for_each_decoder_before_the_first_image(self, serve: Serve):
        with serve(decoders=two_decoders()) as running:
            for name in IMAGES:
                assert by_decoder(running, name) == {"a": 0, "b": 0}
            for name in ("pid_steps_total", "pid_batch_size_count", "pid_device_busy_seconds_total"):
                assert by_decoder(running, name) == {"a": 0, "b": 0}
            assert by_decoder(running, "pid_images_total", format="png") == {"a": 0, "b": 0}
            assert by_decoder(running, "pid_image_outcomes_total", outcome="late") == {"a": 0, "b": 0}
            assert by_decoder(running, "pid_stage_seconds_count", stage="encode") == {"a": 0, "b": 0}
            assert by_decoder(running, "pid_requests_total", code="200", protocol="kserve") == {"": 0, "a": 0, "b": 0}

    def test_waiting_and_running_images_are_counted_by_decoder(self, serve: Serve):
        held = ControlledRuntime({SIZE: SimulatedCost()})
        with serve(decoders=two_decoders(held)) as running, ThreadPoolExecutor(3) as pool:
            held.pause()
            responses = [pool.submit(running.decode)]
            until(lambda: by_decoder(running, "pid_running_images") == {"a": 1, "b": 0})
            responses += [pool.submit(running.decode, make_latent(4, 2, 2)) for _ in range(2)]
            until(lambda: by_decoder(running, "pid_queue_images") == {"a": 0, "b": 2})
            held.resume()
            assert [response.result().status_code for response in responses] == [200] * 3
            until(lambda: all(not any(by_decoder(running, name).values()) for name in IMAGES))

    def test_images_in_the_encoder_are_counted_by_decoder(self, serve: Serve):
        late = LateRowsRuntime({SIZE: SimulatedCost()})
        with serve(decoders=two_decoders(late)) as running, ThreadPoolExecutor(1) as pool:
            late.arrived.clear()
            response = pool.submit(running.decode, format="webp")
            until(lambda: by_decoder(running, "pid_encoding_images") == {"a": 1, "b": 0})
            late.arrived.set()
            assert response.result().status_code == 200
            until(lambda: by_decoder(running, "pid_encoding_images") == {"a": 0, "b": 0})

    def test_requests_images_steps_and_device_time_are_counted_by_decoder(self, serve: Serve):
        with serve(decoders=two_decoders()) as running:
            assert running.decode(make_latent(4, 2, 2), format="webp").status_code == 200
            assert running.decode(make_latent(4, 2, 2), steps=2).status_code == 200
            until(lambda: by_decoder(running, "pid_image_outcomes_total", outcome="in-time") == {"a": 0, "b": 2})
            assert by_decoder(running, "pid_steps_total") == {"a": 0, "b": 6}
            assert by_decoder(running, "pid_images_total", format="webp") == {"a": 0, "b": 1}
            assert by_decoder(running, "pid_request_seconds_count", code="200") == {"": 0, "a": 0, "b": 2}
            busy = by_decoder(running, "pid_device_busy_seconds_total")
            assert busy["a"] == 0 < busy["b"]

    def test_previews_are_counted_by_decoder(self, serve: Serve):
        with serve(decoders=two_decoders()) as running:
            assert by_decoder(running, "pid_previews_total") == {"a": 0, "b": 0}
            response = running.decode(make_latent(4, 2, 2), preview="steps")
            sent = response.text.count("event: preview")
            until(lambda: by_decoder(running, "pid_previews_total")["b"] >= max(1, sent))
            assert by_decoder(running, "pid_previews_total")["a"] == 0

    def test_a_request_that_several_decoders_support_is_counted_without_a_decoder(self, serve: Serve):
        decoders = {name: {"device": simulated()} for name in ("a", "b")}
        with serve(decoders=decoders) as running:
            assert running.decode().status_code == 422
            assert by_decoder(running, "pid_requests_total", code="422", protocol="decode") == {"": 1, "a": 0, "b": 0}
            assert value(running, "pid_refusals_total", code="ambiguous-decoder") == 1

    def test_each_decoder_is_described_with_its_model_and_the_version(self, serve: Serve):
        with serve(decoders=two_decoders()) as running:
            assert by_decoder(running, "pid_info", model="simulated", version=__version__) == {"a": 1, "b": 1}
            assert by_decoder(running, "pid_cost_seconds", stage="step", size=str(SIZE), batch="1").keys() == {"a", "b"}


def test_exactly_one_state_is_set(serve: Serve):
    with serve() as running:
        assert value(running, "pid_state", state="ready") == 1
        assert sum(value(running, "pid_state", state=state) for state in ("starting", "draining", "failed")) == 0
        running.service.lifecycle.fail("for the test")
        assert value(running, "pid_state", state="failed") == 1
        assert value(running, "pid_state", state="ready") == 0


def test_limits_are_those_of_the_settings(serve: Serve):
    with serve(queue_images=7, queue_seconds=9.5, pending_bytes=10_000_000) as running:
        assert value(running, "pid_queue_limit_images") == 7
        assert value(running, "pid_backlog_limit_seconds") == 9.5
        assert value(running, "pid_pending_limit_bytes") == 10_000_000
