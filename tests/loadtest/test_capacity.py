"""The capacity simulation: queueing theory where that has an answer, and the guide's own numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost, SimulatedTable
from loadtest.capacity import by_chance, main, needed, simulate
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Capacity, Schedule, make_schedule
from loadtest.simulated_server import find_table

GUIDE = Path(__file__).parent.parent.parent / "docs/capacity.md"
SIZE = (64, 64)
TABLE = SimulatedTable("test", False, "", {SIZE: SimulatedCost(condition=0.05, step=0.225, finish=0.05)})
SERVICE = TABLE.costs[SIZE].service()  # 1 s
MIX = (RequestClass(name="all", size=SIZE),)


def plan(load: float, replicas: int = 1, seconds: float = 2000.0, **kind: object) -> Schedule:
    mix = (RequestClass(name="all", size=SIZE, **kind),)  # type: ignore[arg-type]
    scenario = Scenario(title="", duration=seconds, arrivals=Arrivals(load=load), mix=mix)
    return make_schedule(scenario, Capacity(TABLE.costs, replicas))


def test_one_replica_waits_as_theory_says():
    """Poisson arrivals, one server, constant service: a mean wait of load · service / (2 (1 − load))."""
    load = 0.6
    result = simulate(plan(load, seconds=8000), TABLE, 1, encode=0.0)
    wait = sum(result.latencies) / len(result.latencies) - SERVICE
    assert wait == pytest.approx(load * SERVICE / (2 * (1 - load)), rel=0.1)
    assert result.busy == pytest.approx(load, rel=0.05)


def test_an_image_alone_takes_its_service_and_its_encoding():
    result = simulate(plan(0.001, seconds=5000), TABLE, 1, encode=0.25)
    assert result.p(50) == pytest.approx(SERVICE + 0.25)


def test_more_replicas_at_the_same_load_wait_less_and_least_connections_less_than_chance():
    p99 = [simulate(plan(0.8, replicas), TABLE, replicas).p(99) for replicas in (1, 4, 16)]
    assert p99 == sorted(p99, reverse=True)
    assert simulate(plan(0.8, 4), TABLE, 4, balance=by_chance).p(99) > 1.3 * p99[1]


def test_beyond_capacity_the_rest_is_refused_and_nothing_admitted_is_late():
    result = simulate(plan(2.0, 4, seconds=300, deadline_ms=5000), TABLE, 4)
    assert 0.4 < result.refused / result.sent < 0.6
    assert result.late == 0
    assert result.busy > 0.95


def test_the_replicas_needed_are_the_fewest_that_do():
    result = needed(rate=5.0, p99=2.5, table=TABLE, mix=MIX, seconds=1000)
    assert result.p(99) <= 2.5
    scenario = Scenario(title="", duration=1000, arrivals=Arrivals(rate=5.0), mix=MIX)
    fewer = simulate(make_schedule(scenario, Capacity(TABLE.costs)), TABLE, result.replicas - 1)
    assert fewer.p(99) > 2.5 or fewer.refused


def test_what_no_number_of_replicas_can_do_is_said(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="one image alone takes longer"):
        needed(rate=5.0, p99=0.5, table=TABLE, mix=MIX, seconds=100)
    assert main(["--table", "gb200", "--rate", "5", "--p99", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("capacity: ")


def test_the_command_prints_a_row_a_case(capsys: pytest.CaptureFixture[str]):
    assert main(["--table", "gb200", "--replicas", "1", "2", "--load", "0.5", "--duration", "30"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


class TestGuide:
    """docs/capacity.md says what the simulation says."""

    @pytest.mark.parametrize(("replicas", "load"), [(1, 0.8), (4, 0.8), (16, 0.9)])
    def test_the_table_of_loads(self, replicas: int, load: float):
        table = find_table("gb200")
        mix = (RequestClass(name="all", size=(2048, 2048)),)
        scenario = Scenario(title="", duration=600, arrivals=Arrivals(load=load), mix=mix)
        capacity = Capacity(table.costs, replicas)
        result = simulate(make_schedule(scenario, capacity), table, replicas)
        (line,) = [line for line in GUIDE.read_text().splitlines() if line.startswith(f"| {100 * load:.0f} %")]
        cell = line.split("|")[2 + [1, 4, 16].index(replicas)]
        assert float(re.findall(r"[\d.]+", cell)[0]) == pytest.approx(result.p(99) / capacity.service(mix[0]), abs=0.06)

    def test_a_million_a_day(self):
        cases = re.findall(r"`(?:--table (\w+) )?--rate ([\d.]+) --p99 ([\d.]+)` \| (\d+) replicas", GUIDE.read_text())
        assert len(cases) >= 4
        mix = (RequestClass(name="all", size=(2048, 2048)),)
        for name, rate, p99, replicas in cases[:1]:  # the others alike; it is a matter of seconds each
            table = find_table(name or "gb200")
            assert needed(float(rate), float(p99), table, mix, 600).replicas == int(replicas)
