"""Scenario files, valid and invalid, and the cost tables that ship with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.errors import ConfigError
from engines.runtime.simulated import load_table
from engines.size import Size
from loadtest.cost_tables import TABLES, SimulatedDecoder, decoder_tables, find_table, output_costs, output_latents
from loadtest.scenario import SCENARIOS, load_scenario
from loadtest.schedule import Capacity, make_schedule
from loadtest.simulated_server import main as simulated_server
from loadtest.simulated_server import simulated_devices
from loadtest.target import simulated_name
from server.scheduling.costs import Output

MEASURED = Path(__file__).parents[2] / "docs" / "measurements" / "kernels-h200.json"

VALID = 'title = "t"\n[arrivals]\nrate = 1\n[[mix]]\nname = "a"\n'


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_scenario_has_requests(path: Path):
    scenario = load_scenario(path)
    tables = decoder_tables(find_table("gb200"), scenario.decoders)
    schedule = make_schedule(scenario, Capacity(output_costs(tables)))
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
        (VALID + '[[decoders]]\nname = "sdxl"\n', r"decoders\.0\.latent_channels: field required"),
        (VALID + '[[decoders]]\nname = "a:b"\nlatent_channels = 4\n', r"decoders\.0\.name"),
        (VALID + '[[decoders]]\nname = "sdxl"\nlatent_channels = 4\nsize = 1\n', r"decoders\.0\.size: extra inputs"),
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


class TestSimulatedDecoders:
    """Several decoders on the devices of one cost table."""

    def test_the_decoders_of_a_scenario_become_flags_that_the_server_parses(self):
        scenario = load_scenario(SCENARIOS / "decoders.toml")
        names, values = scenario.server_flags[::2], scenario.server_flags[1::2]
        assert set(names) == {"--simulated-decoder"}
        assert tuple(map(SimulatedDecoder.parse, values)) == scenario.decoders
        assert len(scenario.decoders) == 2

    def test_costs_and_latents_are_those_of_each_decoder(self):
        table = find_table("gb200")
        tables = decoder_tables(table, [SimulatedDecoder.parse("flux=16:1"), SimulatedDecoder.parse("sdxl=4:0.5")])
        costs, latents = output_costs(tables), output_latents(tables)
        size = Size(4096, 4096)
        assert costs.keys() == latents.keys() == {Output(name, size) for name in tables for size in table.costs}
        assert costs[Output("flux", size)] == table.costs[size]
        assert costs[Output("sdxl", size)].service() == pytest.approx(table.costs[size].service() / 2)
        assert latents[Output("flux", size)] == (16, 128, 128)
        assert latents[Output("sdxl", size)] == (4, 128, 128)

    def test_two_decoders_need_different_names(self):
        with pytest.raises(ConfigError, match="the same name"):
            decoder_tables(find_table("gb200"), 2 * [SimulatedDecoder.parse("flux=16:1")])

    @pytest.mark.parametrize(
        "text", ["sdxl", "sdxl=4", "=4:1", "a b=4:1", "sdxl=0:1", "sdxl=4:0", "sdxl=4:nan", "sdxl=4:inf", "sdxl=four:1"]
    )
    def test_an_invalid_flag_is_explained_on_one_line(self, text: str, capsys):
        with pytest.raises(SystemExit) as caught:
            simulated_server(["--simulated-decoder", text])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "write NAME=CHANNELS:COST, as in sdxl=4:0.6" in error
        assert error.count("\n") == 1


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
            ("gb200", "GB200 (simulated, 3072x3072 estimated)"),
            ("h200", "H200 (simulated, 3072x3072 and 4096x4096 estimated)"),
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
