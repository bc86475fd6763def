"""The capacity simulation, compared with an exact result of queueing theory and with the numbers in the guide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import SimulatedCost, SimulatedTable
from engines.size import Size
from loadtest.capacity.__main__ import main, replicas_needed
from loadtest.capacity.simulation import (
    least_backlog,
    least_connections,
    least_of_four,
    random_replica,
    round_robin,
    simulate,
)
from loadtest.cost_tables import decoder_tables, find_table, output_costs
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.schedule import Capacity, Schedule, make_schedule

GUIDE = (Path(__file__).parent.parent.parent / "docs/capacity.md").read_text()
GUIDE_ROWS = re.findall(r"`(?:--table (\w+) )?--rate ([\d.]+) --p99 ([\d.]+)` \| (\d+) replicas", GUIDE)
GPU_ROWS = re.findall(r"^\| ([\d.]+) \| [\d.]+ \| (\d+) \| (\d+) \| (\d+) \|$", GUIDE, re.MULTILINE)
SIZE = Size(64, 64)
TABLE = SimulatedTable("test", "", {SIZE: SimulatedCost(condition=0.05, step=0.225, finish=0.05)})
SERVICE = TABLE.costs[SIZE].service()  # 1 s
MIX = (RequestClass(name="all", size=SIZE),)
MIX_2K = (RequestClass(name="all", size=Size(2048, 2048)),)


def schedule(load: float, replicas: int = 1, seconds: float = 2000.0, **fields: object) -> Schedule:
    mix = (RequestClass(name="all", size=SIZE, **fields),)  # type: ignore[arg-type]
    scenario = Scenario(title="", duration=seconds, arrivals=Arrivals(load=load), mix=mix)
    return make_schedule(scenario, Capacity(output_costs(decoder_tables(TABLE)), replicas))


def test_the_mean_wait_of_one_replica_is_that_of_an_m_d_1_queue():
    """Poisson arrivals, constant service time, one server: load · service / (2 (1 − load))."""
    load = 0.6
    result = simulate(schedule(load, seconds=8000), TABLE, 1, encode=0.0)
    wait = sum(result.latencies) / len(result.latencies) - SERVICE
    assert wait == pytest.approx(load * SERVICE / (2 * (1 - load)), rel=0.1)
    assert result.utilisation == pytest.approx(load, rel=0.05)


def test_the_latency_without_load_is_service_time_plus_encoding():
    result = simulate(schedule(0.001, seconds=5000), TABLE, 1, encode=0.25)
    assert result.percentile(50) == pytest.approx(SERVICE + 0.25)


def test_more_replicas_wait_less_at_the_same_load():
    p99 = [simulate(schedule(0.8, n, seconds=600), TABLE, n).percentile(99) for n in (1, 4, 16)]
    assert p99 == sorted(p99, reverse=True)


def test_requests_wait_less_the_more_replicas_the_load_balancer_compares():
    balancers = (random_replica, least_of_four, least_connections)
    p99 = [simulate(schedule(0.8, 4, seconds=600), TABLE, 4, balance=b).percentile(99) for b in balancers]
    assert p99[0] > 1.3 * p99[1] > 1.3 * p99[2]


def test_with_two_sizes_round_robin_waits_longer_than_least_connections_and_the_backlog_less():
    mix = (*MIX_2K, RequestClass(name="large", size=Size(4096, 4096)))
    table = find_table("gb200")
    scenario = Scenario(title="", duration=800, arrivals=Arrivals(load=0.8), mix=mix)
    arrivals = make_schedule(scenario, Capacity(output_costs(decoder_tables(table)), 4))
    p99 = [simulate(arrivals, table, 4, balance=b).percentile(99) for b in (round_robin, least_connections)]
    assert p99[0] > p99[1] > simulate(arrivals, table, 4, balance=least_backlog).percentile(99)


def test_a_rejected_request_is_sent_to_another_replica():
    arrivals = schedule(0.8, 2, seconds=2000, deadline_ms=3000)
    rejected = [simulate(arrivals, TABLE, 2, balance=random_replica, retries=n).rejected for n in (0, 1, 2)]
    assert rejected[0] > 2 * rejected[1] > 0
    assert rejected[2] == rejected[1]  # there is no third replica


def test_beyond_capacity_the_excess_is_rejected_and_no_admitted_request_is_late():
    result = simulate(schedule(2.0, 4, seconds=300, deadline_ms=5000), TABLE, 4)
    assert 0.4 < result.rejected / result.sent < 0.6
    assert result.late == 0
    assert result.utilisation > 0.95


def test_one_replica_fewer_than_needed_misses_the_target():
    result = replicas_needed(rate=5.0, p99=2.5, table=TABLE, mix=MIX, seconds=500)
    assert result.percentile(99) <= 2.5
    scenario = Scenario(title="", duration=500, arrivals=Arrivals(rate=5.0), mix=MIX)
    fewer = simulate(make_schedule(scenario, Capacity(output_costs(decoder_tables(TABLE)))), TABLE, result.replicas - 1)
    assert fewer.percentile(99) > 2.5 or fewer.rejected


def test_an_impossible_target_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="a single decode takes longer"):
        replicas_needed(rate=5.0, p99=0.5, table=TABLE, mix=MIX, seconds=100)
    assert main(["--table", "gb200", "--rate", "5", "--p99", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("capacity: ")


def test_random_choice_needs_more_replicas():
    needed = [
        replicas_needed(3.0, 2.5, TABLE, MIX, 200, balance).replicas for balance in (random_replica, least_connections)
    ]
    assert needed[0] > needed[1]


def test_the_command_prints_one_row_per_case(capsys: pytest.CaptureFixture[str]):
    assert main(["--table", "gb200", "--replicas", "1", "2", "--load", "0.5", "--duration", "30"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["--replicas", "2", "--load", "0.5", "--duration", "30", "--balance", "random", "backlog"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["random", "backlog"]


class TestGuide:
    """The numbers in docs/capacity.md are those of the simulation."""

    @pytest.mark.parametrize(("replicas", "load"), [(1, 0.8), (4, 0.8), pytest.param(16, 0.9, marks=pytest.mark.slow)])
    def test_the_table_of_loads_matches_the_simulation(self, replicas: int, load: float):
        table = find_table("gb200")
        scenario = Scenario(title="", duration=600, arrivals=Arrivals(load=load), mix=MIX_2K)
        capacity = Capacity(output_costs(decoder_tables(table)), replicas)
        result = simulate(make_schedule(scenario, capacity), table, replicas)
        (line,) = [line for line in GUIDE.splitlines() if line.startswith(f"| {100 * load:.0f} %")]
        cell = line.split("|")[2 + [1, 4, 16].index(replicas)]
        expected = result.percentile(99) / capacity.service(MIX_2K[0])
        assert float(re.findall(r"[\d.]+", cell)[0]) == pytest.approx(expected, abs=0.06)

    def test_the_table_of_a_million_images_per_day_has_five_rows(self):
        assert len(GUIDE_ROWS) == 5

    @pytest.mark.parametrize(
        ("name", "rate", "p99", "replicas"),
        [pytest.param(*row, marks=[pytest.mark.slow] if number else []) for number, row in enumerate(GUIDE_ROWS)],
    )
    def test_the_replicas_for_a_million_images_per_day_match_the_simulation(
        self, name: str, rate: str, p99: str, replicas: str
    ):
        table = find_table(name or "gb200")
        assert replicas_needed(float(rate), float(p99), table, MIX_2K, 600).replicas == int(replicas)

    def test_the_table_of_load_balancers_has_four_rows(self):
        assert len(GPU_ROWS) == 4

    @pytest.mark.parametrize(
        "row", [pytest.param(row, marks=[pytest.mark.slow] if n else []) for n, row in enumerate(GPU_ROWS)]
    )
    def test_the_replicas_by_load_balancer_match_the_simulation(self, row: tuple[str, ...]):
        rate, *expected = row
        balancers = (random_replica, least_of_four, least_connections)
        found = [replicas_needed(float(rate), 1.0, find_table("gb200"), MIX_2K, 600, b).replicas for b in balancers]
        assert found == [int(replicas) for replicas in expected]
