"""Arrival processes, and schedules that are drawn in advance from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost
from engines.size import Size
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Capacity, draw_times, make_schedule
from server.scheduling.costs import Output

SIZE = Size(64, 64)
OUTPUT = Output("simulated", SIZE)
CAPACITY = Capacity({OUTPUT: SimulatedCost(condition=0.01, step=0.02, finish=0.01)}, devices=2)  # 0.1 s per decode
KIND = RequestClass(name="small", size=SIZE)


def scenario(duration: float = 1000.0, mix: tuple[RequestClass, ...] = (KIND,), **arrivals: object) -> Scenario:
    return Scenario(title="test", duration=duration, mix=mix, arrivals=Arrivals(**arrivals))  # type: ignore[arg-type]


def times(**fields: object) -> np.ndarray:
    return np.array([arrival.at for arrival in make_schedule(scenario(**fields), CAPACITY).arrivals])


class TestArrivals:
    @pytest.mark.parametrize("process", ["poisson", "uniform", "burst"])
    def test_the_mean_rate_is_the_configured_one(self, process: str):
        at = times(process=process, rate=7.0, burst=5)
        assert len(at) == pytest.approx(7000, rel=0.05)
        assert at.min() >= 0
        assert at.max() < 1000
        assert (np.diff(at) >= 0).all()

    def test_poisson_gaps_have_equal_mean_and_standard_deviation(self):
        gaps = np.diff(times(process="poisson", rate=7.0))
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)

    def test_requests_of_a_burst_have_the_same_time(self):
        _, counts = np.unique(times(process="burst", rate=10.0, burst=5), return_counts=True)
        assert set(counts) == {5}

    def test_the_rate_of_a_ramp_rises_linearly(self):
        at = times(process="ramp", rate=1.0, to_rate=9.0)
        counts, _ = np.histogram(at, bins=4, range=(0, 1000))
        assert counts == pytest.approx([500, 1000, 1500, 2000], rel=0.15)

    def test_load_is_a_multiple_of_the_capacity(self):
        schedule = make_schedule(scenario(100.0, process="poisson", load=5.0), CAPACITY)
        assert schedule.rate == pytest.approx(5 * 2 / 0.1)

    def test_capacity_is_weighted_by_the_mix(self):
        mix = (RequestClass(name="one", size=SIZE), RequestClass(name="three", size=SIZE, images=3, share=3))
        assert CAPACITY.rate(mix) == pytest.approx(2 / (0.25 * 0.1 + 0.75 * 0.3))

    def test_a_replay_sends_the_recorded_requests(self, tmp_path: Path):
        trace = tmp_path / "trace.csv"
        trace.write_text("at,class\n2.5,b\n0.5,a\n99,a\n")
        mix = (RequestClass(name="a", size=SIZE), RequestClass(name="b", size=SIZE))
        schedule = make_schedule(scenario(10.0, mix, process="replay", trace=trace), CAPACITY)
        assert [(arrival.at, arrival.kind.name) for arrival in schedule.arrivals] == [(0.5, "a"), (2.5, "b")]

    @pytest.mark.parametrize("text", ["when\n1\n", "at,class\n1,nobody\n", "at\nsoon\n", "at\n", "at,class\n5000,a\n"])
    def test_an_invalid_trace_is_named_in_one_sentence(self, tmp_path: Path, text: str):
        trace = tmp_path / "trace.csv"
        trace.write_text(text)
        mix = (RequestClass(name="a", size=SIZE),)
        with pytest.raises(ConfigError, match=r"trace\.csv .*\.$"):
            make_schedule(scenario(10.0, mix, process="replay", trace=trace), CAPACITY)


class TestSchedule:
    def test_the_seed_determines_the_schedule(self):
        first, again = (make_schedule(scenario(rate=5.0), CAPACITY) for _ in range(2))
        other = make_schedule(scenario(rate=5.0).model_copy(update={"seed": 2}), CAPACITY)
        assert first == again
        assert first != other

    def test_classes_are_drawn_in_proportion_to_their_shares(self):
        mix = (RequestClass(name="a", size=SIZE, share=3), RequestClass(name="b", size=SIZE, share=1))
        schedule = make_schedule(scenario(mix=mix, rate=10.0), CAPACITY)
        share = np.mean([arrival.kind.name == "a" for arrival in schedule.arrivals])
        assert share == pytest.approx(0.75, abs=0.02)

    def test_the_disconnect_share_disconnects_and_the_baseline_has_the_other_requests_at_the_same_times(self):
        mix = (RequestClass(name="a", size=SIZE, disconnect_share=0.2, patience_services=2),)
        schedule = make_schedule(scenario(mix=mix, rate=10.0), CAPACITY)
        delays = [arrival.disconnect_after for arrival in schedule.arrivals if arrival.disconnect_after is not None]
        assert len(delays) == pytest.approx(2000, rel=0.1)
        assert all(0 <= delay <= 0.2 for delay in delays)
        others = tuple(arrival for arrival in schedule.arrivals if arrival.disconnect_after is None)
        assert schedule.without_disconnects().arrivals == others

    def test_new_prompts_are_a_share_of_a_class_and_differ(self):
        mix = (KIND, RequestClass(name="prompted", size=SIZE, new_prompts=0.25))
        arrivals = make_schedule(scenario(mix=mix, rate=10.0), CAPACITY).arrivals
        plain = [arrival.new_prompt for arrival in arrivals if arrival.kind is KIND]
        prompted = [arrival.new_prompt for arrival in arrivals if arrival.kind is not KIND]
        new = [number for number in prompted if number]
        assert not any(plain)
        assert len(new) == pytest.approx(len(prompted) / 4, rel=0.1)
        assert len(set(new)) == len(new)

    def test_classes_in_closed_loops_are_not_part_of_the_arrivals_nor_of_the_load(self):
        loop = RequestClass(name="loop", size=SIZE, clients=3, images=4)
        schedule = make_schedule(scenario(mix=(KIND, loop), load=0.5), CAPACITY)
        assert {arrival.kind.name for arrival in schedule.arrivals} == {"small"}
        assert schedule.rate == pytest.approx(0.5 * 2 / 0.1)
        assert schedule.loops == schedule.without_disconnects().loops == (loop,)

    def test_deadlines_in_service_times_follow_the_costs(self):
        assert CAPACITY.deadline(RequestClass(name="a", size=SIZE, deadline_services=3)) == pytest.approx(0.3)
        assert CAPACITY.deadline(RequestClass(name="a", size=SIZE, deadline_ms=250)) == pytest.approx(0.25)
        assert CAPACITY.deadline(KIND) is None

    def test_unknown_sizes_too_many_requests_and_devices_without_cost_are_rejected(self):
        with pytest.raises(ConfigError, match="needs 8x8, but the server has 64x64 with simulated"):
            make_schedule(scenario(mix=(RequestClass(name="a", size=Size(8, 8)),), load=1.0), CAPACITY)
        with pytest.raises(ConfigError, match="limit"):
            make_schedule(scenario(rate=1e6), CAPACITY)
        with pytest.raises(ConfigError, match="no time"):
            make_schedule(scenario(load=1.0), Capacity({OUTPUT: SimulatedCost()}))


class TestDecoders:
    """Classes of a server with two decoders, one of which also decodes another size."""

    LARGE = Size(128, 128)
    CAPACITY = Capacity(
        {
            Output("flux", SIZE): SimulatedCost(step=0.25),
            Output("sdxl", SIZE): SimulatedCost(step=0.5),
            Output("sdxl", LARGE): SimulatedCost(step=2.0),
        }
    )

    @pytest.mark.parametrize(
        ("decoder", "size", "seconds"), [("flux", SIZE, 1.0), ("sdxl", SIZE, 2.0), ("sdxl", LARGE, 8.0)]
    )
    def test_service_time_and_deadline_are_those_of_decoder_and_size(self, decoder: str, size: Size, seconds: float):
        kind = RequestClass(name="a", decoder=decoder, size=size, deadline_services=3)
        assert self.CAPACITY.service(kind) == pytest.approx(seconds)
        assert self.CAPACITY.deadline(kind) == pytest.approx(3 * seconds)

    def test_the_load_is_weighted_by_the_decoders_of_the_mix(self):
        mix = (
            RequestClass(name="a", decoder="flux", size=SIZE, share=3),
            RequestClass(name="b", decoder="sdxl", size=self.LARGE),
        )
        assert self.CAPACITY.rate(mix) == pytest.approx(1 / (0.75 * 1.0 + 0.25 * 8.0))

    def test_a_class_without_decoder_uses_the_only_one_of_its_size(self):
        assert self.CAPACITY.output(RequestClass(name="a", size=self.LARGE)) == Output("sdxl", self.LARGE)
        with pytest.raises(ConfigError, match="class a has to name a decoder for 64x64: flux and sdxl support it"):
            self.CAPACITY.output(RequestClass(name="a", size=SIZE))

    @pytest.mark.parametrize(("decoder", "size"), [("flux", LARGE), ("sd3", SIZE)])
    def test_a_class_whose_decoder_is_unknown_or_lacks_its_size_is_rejected(self, decoder: str, size: Size):
        with pytest.raises(ConfigError, match=f"needs {size} with {decoder}, but the server has 64x64 with flux"):
            self.CAPACITY.output(RequestClass(name="a", decoder=decoder, size=size))


def test_thinning_also_works_for_a_falling_ramp():
    arrivals = Arrivals(process="ramp", rate=9.0, to_rate=1.0)
    at = np.array(draw_times(arrivals, 9.0, 1.0, 1000.0, np.random.default_rng(0)))
    assert len(at) == pytest.approx(5000, rel=0.05)
