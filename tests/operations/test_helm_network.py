"""Network access, gateways, autoscaling and monitoring of the Helm chart."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from docker.grafana.dashboard import metric_help, series_names
from docker.helm.manifests import VALUES
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from server.http.app import create_app
from server.service import DecodeService
from server.settings import Settings
from tests.operations.kubernetes_objects import Object, only, template
from tests.programs import ROOT, run

pytestmark = pytest.mark.operate

GATEWAYS = {"namespaceSelector": {"matchLabels": {"name": "gateways"}}}
VALUES_HERE: Object = {
    "image": {"repository": "r.example/pid"},
    "bundles": {"flux": {"claim": {"name": "bundles"}}},
    "networkPolicy": {"from": [GATEWAYS]},
}
KEDA: Object = {"autoscaling": {"kind": "keda"}, "prometheus": {"serviceMonitor": True}}
PRIVATE = {"/health/live", "/health/ready", "/metrics"}


def objects(release: str = "pid", **values: object) -> list[Object]:
    return template({**VALUES_HERE, **values}, release=release)


class TestNetworkPolicy:
    def test_clients_prometheus_and_gateways_can_connect(self):
        (rule,) = only(objects(), "NetworkPolicy")["spec"]["ingress"]
        assert rule["from"] == [
            {"podSelector": {"matchLabels": {"pid-client": "true"}}},
            {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}},
            GATEWAYS,
        ]

    def test_egress_is_limited_to_the_rules_in_the_values(self):
        spec = only(objects(), "NetworkPolicy")["spec"]
        assert "Egress" in spec["policyTypes"]
        assert spec["egress"] == []
        rules = [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 4318, "protocol": "TCP"}]}]
        settings = {"traces": "http://collector/v1/traces"}
        network = {"from": [GATEWAYS], "egress": rules}
        assert only(objects(settings=settings, networkPolicy=network), "NetworkPolicy")["spec"]["egress"] == rules


class TestRoutes:
    def test_routes_have_all_public_paths_and_no_others(self):
        ingress = only(objects(ingress={"enabled": True, "hosts": ["a.example"]}), "Ingress")
        (rule,) = ingress["spec"]["rules"]
        paths = {(path["path"], path["pathType"]) for path in rule["http"]["paths"]}
        route = only(objects(httpRoute={"enabled": True, "parentRefs": [{"name": "public"}]}), "HTTPRoute")
        (rule,) = route["spec"]["rules"]
        assert {(m["path"]["value"], m["path"]["type"].removeprefix("Path")) for m in rule["matches"]} == paths

        def routed(path: str) -> bool:
            return any(path == p or (kind == "Prefix" and path.startswith(f"{p}/")) for p, kind in paths)

        runtime = SimulatedRuntime({Size(256, 256): SimulatedCost()})
        service = DecodeService(Settings(bundle={"": Path()}), {"flux": {"device": runtime}})
        app = create_app(service)
        files = {route.path for route in app.routes if hasattr(route, "path")}  # that OpenAPI does not describe
        served = app.openapi()["paths"].keys() | files
        assert served >= PRIVATE
        assert {path for path in served if not routed(path)} == PRIVATE
        assert all(any(path == p or path.startswith(f"{p}/") for path in served) for p, _ in paths)

    @pytest.mark.parametrize("given", [{}, {"max-deadline": 900, "response-timeout": 30.5}])
    def test_the_timeout_of_the_route_follows_the_settings(self, given: dict[str, float]):
        parents = {"enabled": True, "parentRefs": [{"name": "public"}]}
        (rule,) = only(objects(httpRoute=parents, settings=given), "HTTPRoute")["spec"]["rules"]
        settings = Settings(bundle={"": Path()}, **{name.replace("-", "_"): value for name, value in given.items()})
        assert rule["timeouts"]["request"] == f"{math.ceil(settings.max_deadline + settings.response_timeout)}s"
        service = only(objects(), "Service")
        assert rule["backendRefs"] == [
            {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}
        ]

    def test_the_documented_route_retries_what_another_server_may_accept(self):
        retry = {"codes": [429, 503], "attempts": 1}
        text = (ROOT / "docs/operations.md").read_text()
        documented = re.findall(r"^ *retry: (\{.*?\})(?: #|$)", text, re.MULTILINE)
        assert [yaml.safe_load(value) for value in documented] == [retry]
        route = only(
            objects(httpRoute={"enabled": True, "parentRefs": [{"name": "public"}], "retry": retry}), "HTTPRoute"
        )
        (rule,) = route["spec"]["rules"]
        assert rule["retry"] == retry

    def test_annotations_for_ingress_nginx_are_those_of_the_nginx_configuration(self):
        nginx = (ROOT / "docker/nginx/decoders.conf").read_text()
        annotations = yaml.safe_load((VALUES / "ingress-nginx.yaml").read_text())["ingress"]["annotations"]
        for name, value in annotations.items():
            directive = name.partition("/")[2].replace("-", "_")
            if directive == "load_balance":
                continue
            directive = {"proxy_body_size": "client_max_body_size"}.get(directive, directive)
            (configured,) = re.findall(rf"^\s*{directive} ([^;]+);", nginx, re.MULTILINE)
            seconds = directive.endswith("_timeout")
            assert value == (configured.removesuffix("s") if seconds else configured)


class TestAutoscaling:
    def test_keda_counts_only_the_servers_of_the_release(self, tmp_path: Path):
        """Prometheus evaluates the queries with the series of two releases."""
        first, second = (
            only(objects(release, **KEDA), "ScaledObject")["spec"]["triggers"] for release in ("pid", "other")
        )
        labels = 'job="pid", namespace="default", service="{}", instance="{}", device="{}", decoder="{}"'
        busy = "pid_device_busy_seconds_total{{" + labels + "}}"
        waiting = 'pid_backlog_seconds{{job="pid", namespace="default", service="{}", instance="{}"}}'
        series = {
            busy.format("pid", "a", "cuda:0", "flux"): "0+45x20",
            busy.format("pid", "a", "cuda:0", "sdxl"): "0+15x20",
            busy.format("pid", "b", "cuda:0", "flux"): "0+30x20",
            busy.format("other", "c", "cuda:0", "flux"): "0+15x20",
            waiting.format("pid", "a"): "108x20",
            waiting.format("pid", "b"): "2x20",
            waiting.format("other", "c"): "7x20",
            waiting.format("pid", "d").replace("default", "test"): "50x20",
        }
        expected = [*zip(first, (1.5, 110), strict=True), *zip(second, (0.25, 7), strict=True)]
        queries = [(trigger["metadata"]["query"], value) for trigger, value in expected]
        test = {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {"expr": query, "eval_time": "10m", "exp_samples": [{"labels": "{}", "value": value}]}
                for query, value in queries
            ],
        }
        (tmp_path / "tests.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
        run("promtool", "test", "rules", tmp_path / "tests.yml")

    def test_keda_scales_the_servers_by_existing_metrics(self):
        found = objects(**KEDA)
        scaled, deployment = only(found, "ScaledObject")["spec"], only(found, "Deployment")
        assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert "replicas" not in deployment["spec"]
        for trigger in scaled["triggers"]:
            assert series_names(trigger["metadata"]["query"]) <= metric_help().keys()
            assert trigger["metadata"]["ignoreNullValues"] == "false"  # otherwise missing metrics would count as 0

    @pytest.mark.parametrize("gpus", [1, 2, 3])
    def test_keda_and_hpa_have_the_same_targets_and_behaviour(self, gpus: int):
        values = {"gpu": {"type": "h200", "count": gpus}}
        monitored = {"prometheus": {"serviceMonitor": True}}
        keda = only(objects(**values, **monitored, autoscaling={"kind": "keda", "busy": 0.65}), "ScaledObject")["spec"]
        hpa = only(objects(**values, autoscaling={"kind": "hpa", "busy": 0.65}), "HorizontalPodAutoscaler")["spec"]
        assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
        assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
        thresholds = [float(trigger["metadata"]["threshold"]) for trigger in keda["triggers"]]
        targets = [metric["pods"]["target"]["averageValue"] for metric in hpa["metrics"]]
        assert thresholds == [round(0.65 * gpus, 2), 4]
        assert targets == [f"{thresholds[0] * 1000:.0f}m", "4"]


class TestMonitoring:
    def test_every_release_has_the_job_name_of_the_rules(self):
        found = objects("other", prometheus={"serviceMonitor": True})
        label = only(found, "ServiceMonitor")["spec"]["jobLabel"]
        assert only(found, "Service")["metadata"]["labels"][label] == "pid"

    def test_rules_are_those_of_prometheus_with_another_address_of_the_runbook(self):
        source = (ROOT / "docker/prometheus/rules.yml").read_text()
        rule = only(objects(prometheus={"rules": True}), "PrometheusRule")
        assert rule["spec"] == yaml.safe_load(source)
        rule = only(objects(prometheus={"rules": True, "runbookUrl": "https://wiki.example/pid"}), "PrometheusRule")
        assert rule["spec"] == yaml.safe_load(source.replace("docs/operations.md", "https://wiki.example/pid"))
        assert rule["spec"] != yaml.safe_load(source)

    def test_the_dashboard_is_loaded_by_the_sidecar_of_grafana(self):
        found = only(objects(prometheus={"dashboard": True, "labels": {"release": "prometheus"}}), "ConfigMap")
        assert found["metadata"]["labels"].items() >= {"grafana_dashboard": "1", "release": "prometheus"}.items()
        (text,) = found["data"].values()
        assert json.loads(text) == json.loads((ROOT / "docker/grafana/dashboard.json").read_text())

    def test_labels_are_added_to_objects_that_prometheus_selects(self):
        found = objects(prometheus={"serviceMonitor": True, "rules": True, "labels": {"release": "prometheus"}})
        for kind in ("ServiceMonitor", "PrometheusRule"):
            assert only(found, kind)["metadata"]["labels"]["release"] == "prometheus"
