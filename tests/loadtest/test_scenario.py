"""Scenario files, good and bad, and the cost tables beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import load_table
from loadtest.__main__ import SCENARIOS
from loadtest.scenario import load_scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.simulated_server import TABLES, find_table, simulated_devices

GOOD = 'title = "t"\n[arrivals]\nrate = 1\n[[mix]]\nname = "a"\n'


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_scenarios_of_the_folder_can_be_planned(path: Path):
    plan = make_schedule(load_scenario(path), Capacity(find_table("gb200").costs))
    assert plan.arrivals


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title =", "is not TOML"),
        ('title = "t"\n[arrivals]\nrate = 1\n', "mix: field required"),
        (GOOD + "mood = 1\n", r"mix\.0\.mood: extra inputs"),
        (GOOD.replace("rate = 1", "rate = -1"), r"arrivals\.rate: input should be greater than 0"),
        (GOOD.replace("rate = 1", "rate = 1\nload = 1"), "a rate or a load, one of them"),
        (GOOD.replace("rate = 1", 'process = "replay"'), "a replay needs a trace"),
        (GOOD.replace("rate = 1", 'rate = 1\nprocess = "ramp"'), "a ramp needs"),
        (GOOD + 'size = "huge"\n', r"mix\.0\.size"),
        (GOOD + "deadline_ms = 1\ndeadline_services = 1\n", "not both"),
        (GOOD + '[[mix]]\nname = "a"\n', "share a name"),
        (GOOD + '[[thresholds]]\nmeasure = "late"\n', "at_least or at_most"),
        (GOOD + '[[thresholds]]\nmeasure = "late"\nof = "b"\nat_most = 0\n', "no class of the mix: b"),
        ("warm_up = 60\n" + GOOD, "as long as the whole run"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_one_sentence(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_scenario(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        load_scenario(tmp_path / "nowhere.toml")


def test_a_shorter_run_has_a_shorter_warm_up():
    scenario = load_scenario(SCENARIOS / "mixed.toml", duration=4)
    assert (scenario.duration, scenario.warm_up) == (4, 1)


class TestTables:
    @pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
    def test_those_of_the_folder_make_devices(self, path: Path):
        devices = simulated_devices(load_table(path), count=2)
        assert list(devices) == ["simulated:0", "simulated:1"]

    def test_gb200_costs_what_was_published_and_the_estimates_say_so(self):
        costs = find_table("gb200").costs
        assert costs[2048, 2048].service() == pytest.approx(0.209)
        assert costs[4096, 4096].service() == pytest.approx(1.927)
        assert [find_table(name).estimated for name in ("gb200", "h200", "rtx5090")] == [False, True, True]

    @pytest.mark.parametrize("text", ["{", "[]", '{"costs": {"big": {}}}', '{"costs": {}}', '{"name": 1}'])
    def test_another_file_is_refused_in_one_sentence(self, tmp_path: Path, text: str):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"table\.json .*\.$"):
            load_table(path)
