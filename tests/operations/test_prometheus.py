"""Rules, alerts and the dashboard, checked against a real Prometheus that scrapes real servers."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from docker.grafana import dashboard, example
from docker.grafana.panels import ROWS
from docker.grafana.query import STAGE, PrometheusClient
from docker.grafana.render import draw
from loadtest.scenario import load_scenario
from tests.operations.conftest import LOAD_SECONDS, samples
from tests.operations.gpu_server import CHANNELS
from tests.programs import ROOT, run

FOLDER = ROOT / "docker/prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
QUERIES = {
    f"{panel.title}: {legend}": q for row in ROWS.values() for panel in row for legend, q in panel.queries.items()
}


class TestWithoutPrometheus:
    def test_the_committed_dashboard_is_up_to_date(self):
        assert dashboard.OUTPUT.read_text() == dashboard.as_text(), "run `make operations`"

    def test_rules_and_alerts_read_only_existing_series(self):
        known = dashboard.metric_help().keys()
        for rule in RULES:
            assert dashboard.series_names(rule["expr"]) <= known, rule

    def test_every_server_metric_is_used_in_a_rule_or_panel(self):
        queries = [*(rule["expr"] for rule in RULES), *QUERIES.values()]
        used = {name for query in queries for name in dashboard.series_names(query)}
        ours = {name for name in dashboard.metric_help() if name.startswith("pid_")}
        assert {re.sub(r"_(sum|count)$", "_bucket", name) for name in ours - used} <= used

    def test_a_panel_that_reads_an_unknown_metric_is_rejected(self, monkeypatch: pytest.MonkeyPatch):
        texts = dashboard.metric_help()
        texts.pop("pid_queue_images")
        monkeypatch.setattr(dashboard, "metric_help", lambda: texts)
        with pytest.raises(SystemExit, match="reads pid_queue_images, which is neither"):
            dashboard.as_text()

    def test_panels_do_not_overlap(self):
        occupied = set()
        for panel in dashboard.dashboard()["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & occupied, panel["title"]
            occupied |= cells

    @pytest.mark.parametrize("name", ALERTS)
    def test_each_alert_has_a_firing_case_a_silent_case_and_a_runbook(self, name: str):
        cases = yaml.safe_load((FOLDER / "tests.yml").read_text())["tests"]
        expected = [
            bool(x["exp_alerts"]) for case in cases for x in case.get("alert_rule_test", ()) if x["alertname"] == name
        ]
        assert True in expected
        assert False in expected
        page, _, anchor = ALERTS[name]["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def test_the_runbook_names_existing_panels_and_series(self):
        text = re.sub(r"```.*?```", "", (ROOT / "docs/operations.md").read_text(), flags=re.DOTALL)
        assert dashboard.series_names(text) <= dashboard.metric_help().keys()
        titles = [panel.title for row in ROWS.values() for panel in row]
        panels = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", " ".join(text.partition("## Alerts")[2].split()))
        assert len(panels) > 5
        assert not [panel for panel in panels if not any(title.startswith(panel) for title in titles)]


@pytest.mark.operate
class TestWithPromtool:
    def test_the_configuration_is_valid(self):
        assert "SUCCESS" in run("promtool", "check", "config", "prometheus.yml", folder=FOLDER)

    def test_each_alert_passes_its_unit_tests(self):
        run("promtool", "test", "rules", "tests.yml", folder=FOLDER)


@pytest.mark.operate
class TestWithPrometheus:
    def test_every_metric_in_a_rule_or_panel_has_samples(self, prometheus: str):
        queries = [*(rule["expr"] for rule in RULES), *QUERIES.values()]
        names = {name for query in queries for name in dashboard.series_names(query)}
        assert len(names) > 30
        assert not [name for name in sorted(names) if not samples(prometheus, name)]

    def test_every_rule_is_evaluated_without_error(self, prometheus: str):
        groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == len(RULES)
        assert not [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"]

    @pytest.mark.parametrize("record", [rule["record"] for rule in RULES if "record" in rule])
    def test_every_recording_rule_has_data(self, prometheus: str, record: str):
        assert samples(prometheus, record)

    @pytest.mark.parametrize("panel", QUERIES)
    def test_every_query_of_the_dashboard_has_data(self, prometheus: str, panel: str):
        assert samples(prometheus, PrometheusClient(prometheus, LOAD_SECONDS, "10s").expand(QUERIES[panel]))

    def test_the_load_is_visible(self, prometheus: str):
        def total(query: str) -> float:
            return sum(float(series["value"][1]) for series in samples(prometheus, query))

        assert total('pid_image_outcomes_total{outcome="in-time"}') > 5
        assert total('pid_refusals_total{code="deadline-too-short"}') > 5
        assert total("pid_cancelled_total") + total('pid_image_outcomes_total{outcome="in-time"}') > 10

    def test_panels_select_decoders_exactly_if_their_metric_has_this_label(self, prometheus: str):
        for query in QUERIES.values():
            for name, matchers in re.findall(r"([a-z_:]*pid_[a-z0-9_:]+)\{([^}]*)\}", query):
                is_labelled = bool(samples(prometheus, f'{name}{{decoder!=""}}'))
                assert is_labelled == ('decoder=~"$decoder"' in matchers), query

    @pytest.mark.parametrize("panel", [panel.title for panel in ROWS["Decoders"]])
    def test_panels_of_decoders_have_a_curve_for_each_decoder(self, prometheus: str, panel: str):
        client = PrometheusClient(prometheus, LOAD_SECONDS, "10s")
        for title, query in QUERIES.items():
            if title.startswith(f"{panel}: "):
                found = {series["metric"].get("decoder") for series in samples(prometheus, client.expand(query))}
                assert found == {*CHANNELS, "dct-demo"}

    def test_healthy_servers_raise_no_alert(self, prometheus: str):
        assert not samples(prometheus, 'ALERTS{alertstate="firing"}')

    def test_every_panel_is_drawn_with_data(self, prometheus: str):
        window = 300  # seconds; it includes the load, however long the other tests take
        figure, empty = draw(PrometheusClient(prometheus, window, "10s"))
        assert not empty
        drawn = {axes.get_title(loc="left"): axes for axes in figure.axes}
        for panel in (panel for row in ROWS.values() for panel in row):
            axes = drawn.pop(panel.title.replace("$stage", STAGE))
            if panel.kind in ("stat", "table"):
                assert axes.texts[0].get_text()
            elif panel.kind == "heatmap":
                assert np.nanmax(axes.collections[0].get_array()) > 0
            else:
                bottom, top = axes.get_ylim()
                values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
                assert ((bottom < values) & (values < top)).any()
        assert not drawn


@pytest.mark.operate
def test_every_panel_of_the_example_has_data(tmp_path: Path):
    _, empty = asyncio.run(example.measure(load_scenario(example.LOAD, duration=20), tmp_path))
    assert not empty


def test_the_title_of_the_example_describes_its_load():
    scenario = load_scenario(example.LOAD)
    assert f"from {scenario.arrivals.load} to {scenario.arrivals.to_load} times the capacity" in example.TITLE
    assert scenario.duration == 600
    assert "ten minutes" in example.TITLE


def test_grafana_can_provision_the_dashboard_file():
    document = json.loads(dashboard.OUTPUT.read_text())
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/pid.yaml").read_text())
    assert document["uid"] == "pid"
    assert provider["providers"][0]["type"] == "file"
