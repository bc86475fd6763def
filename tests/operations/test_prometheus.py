"""Rules, alerts and the dashboard, checked against a real Prometheus that scrapes real servers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from docker.grafana import dashboard, example
from docker.grafana.annotations import ANNOTATIONS
from docker.grafana.model import Annotation, Panel
from docker.grafana.panels import ROWS
from docker.grafana.query import STAGE, PrometheusClient
from docker.grafana.render import draw
from engines import __version__
from loadtest.scenario import load_scenario
from tests.operations.conftest import LOAD_SECONDS, samples
from tests.operations.gpu_server import CHANNELS
from tests.programs import ROOT, run

FOLDER = ROOT / "docker/prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
LIMITED = [panel for row in ROWS.values() for panel in row if panel.thresholds]
RUNBOOKS = "docs/operations.md"
DASHBOARD = json.loads(dashboard.OUTPUT.read_text())
QUERIES = {
    f"{panel.title}: {legend}": q for row in ROWS.values() for panel in row for legend, q in panel.queries.items()
}

# Samples per minute of what annotations read, and by annotation the minutes at which events are marked or not.
EVENTS = {
    'pid_info{job="pid", instance="a", decoder="flux", version="1"}': "1x20 stale",
    'pid_info{job="pid", instance="b", decoder="flux", version="2"}': "_x10 1x30",
    'process_start_time_seconds{job="pid", instance="a"}': "6x20 stale",
    'pid_bundle_swaps_total{job="pid", instance="a", decoder="flux", result="done"}': "0x20 1x20",
    'ALERTS{alertname="PidDown", alertstate="pending", job="pid", instance="a"}': "1x20 stale",
    'ALERTS{alertname="PidDown", alertstate="firing", job="pid", instance="a"}': "_x20 1x5 stale",
    'ALERTS{alertname="Other", alertstate="firing", job="pid", instance="a"}': "1x40",
}
MARKED = {
    "Deployments": ({"job": "pid", "version": "2"}, [11, 14], [8, 16, 25]),
    "Starts of servers": ({"job": "pid", "instance": "a"}, [1, 20], [23]),
    "Replaced bundles": (
        {"job": "pid", "instance": "a", "decoder": "flux", "result": "done"},
        [22, 24],
        [19, 27],
    ),
    "Alerts": (
        {"__name__": "ALERTS", "alertname": "PidDown", "alertstate": "firing", "job": "pid", "instance": "a"},
        [22],
        [19, 28],
    ),
}


def expand(query: str) -> str:
    """Replace the dashboard's variables in a query."""
    return PrometheusClient("http://127.0.0.1", LOAD_SECONDS, "10s").expand(query)


def anchors() -> set[str]:
    """Return the anchors of the sections of the page with the runbooks."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / RUNBOOKS).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
        for panel in DASHBOARD["panels"]:
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
        base, _, anchor = ALERTS[name]["annotations"]["runbook_url"].partition("#")
        assert base == f'{{{{ or $externalLabels.runbooks "{RUNBOOKS}" }}}}'
        assert anchor in anchors()

    def test_all_links_of_the_dashboard_lead_to_sections_of_the_runbooks(self):
        links = DASHBOARD["links"] + [link for panel in DASHBOARD["panels"] for link in panel.get("links", ())]
        (base,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "runbooks"]
        assert base["query"] == RUNBOOKS
        assert dashboard.OUTPUT.read_text().count(RUNBOOKS) == 1
        for link in links:
            prefix, _, anchor = link["url"].partition("#")
            assert prefix == "${runbooks:raw}"
            assert anchor in anchors()
        linked = {link["title"].removeprefix("Runbook: ") for link in links}
        assert ALERTS.keys() <= linked

    def test_a_panel_that_links_to_an_unknown_alert_is_rejected(self, monkeypatch: pytest.MonkeyPatch):
        known = dashboard.runbook_anchors()
        known.pop("PidErrors")
        monkeypatch.setattr(dashboard, "runbook_anchors", lambda: known)
        with pytest.raises(SystemExit, match="links to PidErrors, which is not an alert"):
            dashboard.as_text()

    @pytest.mark.parametrize("panel", LIMITED, ids=lambda panel: panel.title)
    def test_panels_mark_the_limits_of_their_alerts(self, panel: Panel):
        limits = [
            float(limit)
            for alert in panel.alerts
            if dashboard.series_names(ALERTS[alert]["expr"]) & dashboard.series_names(str(panel.queries))
            for limit in re.findall(r"> ([\d.]+)", ALERTS[alert]["expr"])
        ]
        assert set(limits) <= panel.thresholds.keys()
        assert list(panel.thresholds) == sorted(panel.thresholds)

    def test_annotations_read_only_existing_series(self, monkeypatch: pytest.MonkeyPatch):
        texts = dashboard.metric_help()
        texts.pop("process_start_time_seconds")
        monkeypatch.setattr(dashboard, "metric_help", lambda: texts)
        with pytest.raises(SystemExit, match="annotation 'Starts of servers' reads process_start_time_seconds"):
            dashboard.as_text()

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

    @pytest.mark.parametrize("annotation", ANNOTATIONS, ids=lambda annotation: annotation.name)
    def test_annotations_mark_their_events_and_nothing_else(self, annotation: Annotation, tmp_path: Path):
        labels, marked, unmarked = MARKED[annotation.name]
        query = f"({expand(annotation.query)}) * 0 + 1" if "__name__" not in labels else expand(annotation.query)
        series = ", ".join(f'{name}="{value}"' for name, value in labels.items() if name != "__name__")
        found = [{"labels": f"{labels.get('__name__', '')}{{{series}}}", "value": 1}]
        cases = [
            {"expr": query, "eval_time": f"{minute}m", "exp_samples": found if minute in marked else []}
            for minute in [*marked, *unmarked]
        ]
        inputs = [{"series": name, "values": values} for name, values in EVENTS.items()]
        test = {"interval": "1m", "input_series": inputs, "promql_expr_test": cases}
        (tmp_path / "tests.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
        run("promtool", "test", "rules", "tests.yml", folder=tmp_path)


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
        assert samples(prometheus, expand(QUERIES[panel]))

    @pytest.mark.parametrize("annotation", ANNOTATIONS, ids=lambda annotation: annotation.name)
    def test_annotations_are_valid_queries_and_mark_the_start_of_each_server(
        self, prometheus: str, annotation: Annotation
    ):
        found = samples(prometheus, f"max_over_time(({expand(annotation.query)})[30m:2s])")
        expected = {"Deployments": {__version__}, "Starts of servers": {"cpu", "gpu"}}
        label = "version" if annotation.name == "Deployments" else "instance"
        assert {series["metric"].get(label) for series in found} == expected.get(annotation.name, set())
        if annotation.values_are_times:
            assert all(0 < time.time() - float(series["value"][1]) / 1000 < 3600 for series in found)

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
        for title, query in QUERIES.items():
            if title.startswith(f"{panel}: "):
                found = {series["metric"].get("decoder") for series in samples(prometheus, expand(query))}
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
    assert document["uid"] == "pid-decode-server"
    assert provider["providers"][0]["type"] == "file"
