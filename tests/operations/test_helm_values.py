"""Wrong values of the Helm chart, and its schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from docker.helm.manifests import CHART, SCHEMA, schema
from tests.operations.helm_values import GATEWAY, HASH, SOURCES, values
from tests.operations.kubernetes_objects import Object, run_chart

pytestmark = pytest.mark.operate

WRONG: list[tuple[Object, str]] = [
    ({"bundles": {}}, "Set bundles: one decoder or more by name"),
    ({"bundles": {"flux": {}}}, "bundles.flux needs exactly one source out of .*; it has none"),
    ({"bundles": {"flux": {**SOURCES["demo"], **SOURCES["claim"]}}}, "it has claim and demo"),
    ({"bundles": {"a=b": SOURCES["demo"]}}, "(?i)does not match pattern"),
    ({"bundles": {"a": {"claim": {"name": "x", "path": "../y"}}}}, "bundles.a.claim.path"),
    ({"bundles": {"a": {"image": {"reference": "r.example/x:latest"}}}}, "sha256"),
    ({"bundles": {"a": {"http": {"url": "http://x/y", "sha256": HASH}}}}, "https://"),
    ({"image": {"repository": ""}}, "Set image.repository to the name"),
    ({"gpu": {"type": "h100"}}, "gpu.type.* must be one of"),
    ({"gpu": {"type": "cuda", "count": 2, "resource": "nvidia.com/mig-3g.71gb"}}, "only one MIG instance"),
    ({"gpu": {"type": "none", "count": 2}}, "Set gpu.type to the kind of GPU"),
    ({"settings": {"queue-second": 1}}, "queue-second"),
    ({"settings": {"traces": "collector:4318"}}, "settings.traces"),
    ({"settings": {"traces": "http://collector:4318"}}, "networkPolicy.egress .* of settings.traces"),
    ({"bundles": {"flux": SOURCES["http"]}}, "networkPolicy.egress .* of bundles.flux.http"),
    ({"env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://x"}]}, "of OTEL_EXPORTER_OTLP_ENDPOINT"),
    ({"env": [{"name": "OTEL_BSP_SCHEDULE_DELAY", "value": 5}]}, "env.0.value"),
    ({"bundles": {"a": {"http": {"sha256": HASH}}}}, "bundles.a.http"),
    ({"rollingUpdate": {"maxSurge": 0}}, "no pod could be replaced"),
    ({"rollingUpdate": {"maxSurge": "0%", "maxUnavailable": "0%"}}, "no pod could be replaced"),
    ({"cacheClaim": {"create": True, "accessModes": ["ReadWriteOncePod"]}}, "cacheClaim.accessModes"),
    ({"cacheClaim": {"create": True, "accessModes": ["ReadWriteOnce"]}}, "Set cacheClaim.accessModes to"),
    ({"autoscaling": {"kind": "keda"}}, "Set prometheus.serviceMonitor"),
    ({"settings": {"bundle": "x"}}, "settings.bundle is set by the chart; use the value bundles"),
    ({"settings": {"ssl-certfile": "x"}}, "let a gateway terminate TLS"),
    ({"settings": {"PID_QUEUE_SECONDS": 1}}, "PID_QUEUE_SECONDS"),
    ({"env": [{"name": "PID_QUEUE_SECONDS", "value": "1"}]}, "env.0.name"),
    ({"apiKeys": {"existingSecret": "a", "keys": {"a": "0123456789abcdef"}}}, "not both"),
    ({"apiKeys": {"keys": {"a": "short"}}}, "(?i)does not match pattern"),
    ({"captions": {"claim": "x"}}, "Set captions.encoder"),
    ({"captions": {"encoder": "x"}}, "Set captions.claim"),
    ({"autoscaling": {"kind": "hpa", "maxReplicas": 1}}, "Set autoscaling.maxReplicas"),
    ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "x"}]}}, "Set networkPolicy.from"),
    ({"httpRoute": {"enabled": True}, **GATEWAY}, "Set httpRoute.parentRefs"),
    ({"ingress": {"enabled": True}, **GATEWAY}, "Set ingress.hosts"),
    ({"cacheClaim": {"name": "shared"}}, "Set cacheClaim.name to a separate claim"),
    ({"service": {"type": "LoadBalancer"}}, "Set networkPolicy.from"),
    ({"prometheus": {"runbookUrl": "wiki"}}, "runbookUrl"),
    ({"replica": 2}, "(?i)additional propert(y|ies) .?replica"),
]


# Messages about single values come from Helm, and differ between its versions.
class TestErrors:
    @pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
    def test_wrong_values_are_rejected(self, wrong: Object, message: str):
        completed = run_chart({**values(), **wrong})
        assert completed.returncode != 0
        assert re.search(message, completed.stderr), completed.stderr

    def test_a_built_bundle_needs_a_claim(self):
        completed = run_chart(values("build", {"bundleClaim": {"create": False}}))
        assert "Set bundleClaim.name to an existing PersistentVolumeClaim" in completed.stderr

    @pytest.mark.parametrize("replicas", [1, 2])
    def test_one_pod_at_a_time_can_use_a_claim_of_one_node(self, replicas: int):
        claim = {"cacheClaim": {"create": True, "accessModes": ["ReadWriteOnce"]}}
        update = {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}, "replicas": replicas}
        completed = run_chart(values("claim", claim, update))
        assert (completed.returncode == 0) == (replicas == 1)

    def test_image_volumes_need_a_recent_kubernetes(self):
        completed = run_chart(values("image"), "--kube-version", "1.32")
        assert "bundles.flux.image needs Kubernetes 1.35" in completed.stderr

    def test_the_schema_is_strict_and_has_the_members_of_the_values(self):
        schema = json.loads((CHART / "values.schema.json").read_text())
        free = {"settings", "bundles", "nodeSelector", "affinity", "apiKeys.keys", "ingress.annotations"}
        free |= {"podLabels", "podAnnotations", "service.annotations", "httpRoute.retry"}
        free |= {"prometheus.labels", "resources", "builder.resources.requests", "builder.resources.limits"}

        def resolve(part: Object) -> Object:
            return schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part

        def walk(part: Object, value: Any, path: str) -> Iterator[str]:
            if isinstance(value, dict) and path not in free:
                assert part["additionalProperties"] is False, path
                assert part["properties"].keys() - {"global"} == value.keys(), path
                for name, member in value.items():
                    yield from walk(resolve(part["properties"][name]), member, f"{path}.{name}".removeprefix("."))
            yield path

        paths = set(walk(schema, yaml.safe_load((CHART / "values.yaml").read_text()), ""))
        assert free <= paths

    def test_the_schema_has_the_settings_of_the_server(self):
        assert SCHEMA.read_text() == schema(), "run `make operations`"
        assert {"queue-seconds", "max-deadline"} <= set(json.loads(schema())["definitions"]["setting"]["enum"])
