"""Scenario files, valid and invalid, and the cost tables that ship with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import load_table
from engines.size import Size
from loadtest.cost_tables import TABLES, find_table
from loadtest.scenario import SCENARIOS, load_scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.simulated_server import simulated_devices
from loadtest.target import simulated_name

MEASURED = Path(__file__).parents[2] / "docs" / "measurements" / "kernels-h200.json"

VALID = 'title = "t"\n[arrivals]\nrate = 1\n[[mix]]\nname = "a"\n'


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_scenario_has_requests(path: Path):
    schedule = make_schedule(load_scenario(path), Capacity(find_table("gb200").costs))
    assert schedule.arrivals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title =", "is not valid TOML"),
        ('title = "t"\n[arrivals]\nrate = 1\n', "mix: field required"),
        (VALID + "mood = 1\n", r"mix\.0\.mood: extra inputs"),
        (VALID.replace("rate = 1", "rate = -1"), r"arrivals\.rate: input should be greater than 0"),
        (VALID.replace("rate = 1", "rate = 1\nload = 1"), "exactly one of rate and load"),
        (VALID.replace("rate = 1", 'process = "replay"'), "replay requires a trace"),
        (VALID.replace("rate = 1", 'rate = 1\nprocess = "ramp"'), "ramp requires"),
        (VALID + 'size = "huge"\n', r"mix\.0\.size"),
        (VALID + "deadline_ms = 1\ndeadline_services = 1\n", "not both"),
        (VALID + '[[mix]]\nname = "a"\n', "the same name"),
        (VALID + '[[thresholds]]\nmeasure = "late"\n', "at_least and at_most"),
        (VALID + '[[thresholds]]\nmeasure = "late"\nof = "b"\nat_most = 0\n', "unknown class: b"),
        ("warm_up = 60\n" + VALID, "warm_up must be shorter"),
        (VALID + "clients = 2\n", "must follow the arrivals"),
        (VALID + "clients = 2\ndisconnect_share = 0.5\n", r"mix\.0: clients and disconnect_share"),
        (VALID + "clients = 2\nnew_prompts = 0.5\n", r"mix\.0: clients and new_prompts"),
        (VALID + "new_prompts = 2\n", r"mix\.0\.new_prompts: input should be less than or equal to 1"),
        (VALID + "read_after = 120\n", "read_after must be shorter than timeout"),
        (VALID + "[[pauses]]\nat = 58\nseconds = 2\n", "within duration"),
        (VALID + '[[thresholds]]\nmeasure = "late"\nsince = 60\nat_most = 0\n', "within duration"),
        (VALID + 2 * "[[pauses]]\nat = 5\nseconds = 2\n", "begin after the end"),
        (VALID + "[rolling_restart]\n[[pauses]]\nat = 5\nseconds = 2\n", "cannot be combined"),
        (VALID + '[[faults]]\nfault = "fail-step"\n[[pauses]]\nat = 5\nseconds = 2\n', "cannot be combined"),
    ],
)
def test_an_invalid_scenario_is_explained_in_one_sentence(tmp_path: Path, text: str, message: str):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_scenario(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_the_former_names_of_keys_are_still_accepted(tmp_path: Path):
    path = tmp_path / "scenario.toml"
    path.write_text(VALID + 'leaving = 0.25\nleaves = "streaming"\n')
    (kind,) = load_scenario(path).mix
    assert (kind.disconnect_share, kind.disconnect_phase) == (0.25, "streaming")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Cannot read the scenario .*nowhere\.toml"):
        load_scenario(tmp_path / "nowhere.toml")


def test_a_shorter_run_has_a_shorter_warm_up():
    scenario = load_scenario(SCENARIOS / "mixed.toml", duration=4)
    assert (scenario.duration, scenario.warm_up) == (4, 1)


class TestTables:
    @pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
    def test_every_shipped_table_makes_devices(self, path: Path):
        devices = simulated_devices(load_table(path), count=2)
        assert list(devices) == ["simulated:0", "simulated:1"]

    def test_gb200_has_the_published_costs(self):
        costs = find_table("gb200").costs
        assert costs[Size(2048, 2048)].service() == pytest.approx(0.209)
        assert costs[Size(4096, 4096)].service() == pytest.approx(1.927)

    def test_h200_has_the_measured_costs(self):
        row = json.loads(MEASURED.read_text())["decode"]
        cost = find_table("h200").costs[Size(2048, 2048)]
        assert [1000 * cost.condition, 1000 * cost.step, 1000 * cost.finish] == pytest.approx(
            [row["condition ms"], row["step ms"], row["finish ms"]]
        )

    @pytest.mark.parametrize(
        ("table", "name"),
        [
            ("gb200", "GB200 (simulated)"),
            ("h200", "H200 (simulated, 4096x4096 estimated)"),
            ("rtx5090", "RTX 5090 (simulated, estimated)"),
        ],
    )
    def test_estimated_costs_are_marked_in_reports(self, table: str, name: str):
        assert simulated_name(find_table(table)) == name

    @pytest.mark.parametrize("text", ["{", "[]", '{"costs": {"big": {}}}', '{"costs": {}}', '{"name": 1}'])
    def test_an_invalid_table_is_named_in_one_sentence(self, tmp_path: Path, text: str):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"table\.json.*\.$"):
            load_table(path)
