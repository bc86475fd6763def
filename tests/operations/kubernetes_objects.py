"""Objects of the manifests and of the Helm chart, and schemas for them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import cache
from typing import Any

import yaml

from docker.helm.manifests import CHART, MANIFESTS
from tests.programs import program

VERSIONS = ("1.30", "1.37")  # of Kubernetes

Object = dict[str, Any]


def strict(required: dict[str, Any], **optional: Any) -> Object:
    """Return a JSON schema of an object with these members and no others."""
    members = {**required, **optional}
    return {"type": "object", "required": list(required), "properties": members, "additionalProperties": False}


def array(items: Object) -> Object:
    """Return a JSON schema of a non-empty array."""
    return {"type": "array", "items": items, "minItems": 1}


TEXT, NUMBER, LABELS = {"type": "string"}, {"type": "integer"}, {"type": "object"}
RULE = {
    "oneOf": [
        strict({"record": TEXT, "expr": TEXT}, labels=LABELS),
        strict({"alert": TEXT, "expr": TEXT, "annotations": LABELS}, labels=LABELS, **{"for": TEXT}),
    ]
}
TRIGGER = strict(
    {
        "type": {"const": "prometheus"},
        "metadata": strict({"serverAddress": TEXT, "query": TEXT, "threshold": TEXT, "ignoreNullValues": TEXT}),
    }
)
MATCH = strict({"path": strict({"type": {"enum": ["Exact", "PathPrefix"]}, "value": TEXT})})
ROUTE = strict(
    {
        "matches": array(MATCH),
        "backendRefs": array(strict({"name": TEXT, "port": NUMBER})),
        "timeouts": strict({"request": {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}}),
    },
    retry=strict({"codes": array(NUMBER)}, attempts=NUMBER),
)
# Schemas of the custom resources, with the members used here; the Kubernetes schemas do not include them.
CUSTOM = {
    "ServiceMonitor": strict(
        {
            "jobLabel": TEXT,
            "selector": strict({"matchLabels": LABELS}),
            "endpoints": array(strict({"port": TEXT, "path": TEXT, "interval": TEXT})),
        }
    ),
    "PrometheusRule": strict({"groups": array(strict({"name": TEXT, "rules": array(RULE)}))}),
    "ScaledObject": strict(
        {"scaleTargetRef": strict({"name": TEXT}), "triggers": array(TRIGGER)},
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        pollingInterval=NUMBER,
        fallback=strict({"failureThreshold": NUMBER, "replicas": NUMBER}),
        advanced=strict({"horizontalPodAutoscalerConfig": strict({"behavior": LABELS})}),
    ),
    "HTTPRoute": strict(
        {"parentRefs": array(strict({"name": TEXT}, namespace=TEXT)), "rules": array(ROUTE)}, hostnames=array(TEXT)
    ),
}


def validate(document: Object, version: str) -> None:
    """Validate an object against the schema of a Kubernetes version, or a custom resource against its own.

    Raises:
        kubernetes_validate.ValidationError, jsonschema.ValidationError: The object is invalid.
    """
    import jsonschema
    import kubernetes_validate

    if document["kind"] in CUSTOM:
        jsonschema.validate(document["spec"], CUSTOM[document["kind"]])
    else:
        kubernetes_validate.validate(document, version, strict=True)


@cache
def manifest(name: str) -> tuple[Object, ...]:
    """Return the objects of a manifest in docker/kubernetes."""
    return tuple(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()))


def run_chart(values: Object, *options: str, release: str = "pid") -> subprocess.CompletedProcess[str]:
    """Run `helm template` with values."""
    command = [program("helm"), "template", release, str(CHART), "--values", "-", *options]
    return subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True)


def template(values: Object, *options: str, release: str = "pid") -> list[Object]:
    """Return the objects of the chart with values."""
    completed = run_chart(values, *options, release=release)
    assert completed.returncode == 0, completed.stderr
    return [document for document in yaml.safe_load_all(completed.stdout) if document]


def only(objects: Iterable[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = [x for x in objects if x["kind"] == kind]
    return found


def pods(objects: Iterable[Object]) -> list[Object]:
    """Return the pod templates of Deployments."""
    return [x["spec"]["template"] for x in objects if x["kind"] == "Deployment"]


def server_pod(objects: Iterable[Object]) -> Object:
    """Return the specification of the server's pods."""
    spec: Object = only(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def environment(objects: Iterable[Object]) -> dict[str, str]:
    """Return the environment variables of the server."""
    (server,) = server_pod(objects)["containers"]
    return {variable["name"]: variable["value"] for variable in server["env"]}
