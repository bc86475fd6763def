"""Every overlay, built by kustomize: valid against Kubernetes' schemas, consistent in itself and with the server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import build_engines
from docker.kubernetes import prometheus_rule
from engines.compile.targets import TARGETS
from engines.compile.workspace import SUFFIX
from server.settings import Settings
from tests.operations.programs import ROOT, run

FOLDER = ROOT / "docker/kubernetes"
GPUS = ("rtx5090", "h200", "gb200")
OVERLAYS = ("cpu-demo", *GPUS)
VERSIONS = ("1.30", "1.37")  # of Kubernetes
SERVER = {"app.kubernetes.io/name": "pid", "app.kubernetes.io/component": "server"}

Object = dict[str, Any]


def strict(required: dict[str, Any], **optional: Any) -> Object:
    """An object with these members and no others."""
    members = {**required, **optional}
    return {"type": "object", "required": list(required), "properties": members, "additionalProperties": False}


TEXT, NUMBER, LABELS = {"type": "string"}, {"type": "integer"}, {"type": "object"}
SELECTOR = strict({"matchLabels": LABELS})
RULE = {
    "oneOf": [
        strict({"record": TEXT, "expr": TEXT}, labels=LABELS),
        strict({"alert": TEXT, "expr": TEXT, "annotations": LABELS}, labels=LABELS, **{"for": TEXT}),
    ]
}
TRIGGER = strict(
    {"type": {"const": "prometheus"}, "metadata": strict({"serverAddress": TEXT, "query": TEXT, "threshold": TEXT})}
)
# The members of custom resources that are in use here; Kubernetes' own schemas do not have them.
CUSTOM = {
    "ServiceMonitor": strict(
        {
            "selector": SELECTOR,
            "endpoints": {"type": "array", "items": strict({"port": TEXT, "path": TEXT, "interval": TEXT})},
        }
    ),
    "PrometheusRule": strict(
        {"groups": {"type": "array", "items": strict({"name": TEXT, "rules": {"type": "array", "items": RULE}})}}
    ),
    "ScaledObject": strict(
        {"scaleTargetRef": strict({"name": TEXT}), "triggers": {"type": "array", "items": TRIGGER}},
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        pollingInterval=NUMBER,
        fallback=strict({"failureThreshold": NUMBER, "replicas": NUMBER}),
        advanced=strict({"horizontalPodAutoscalerConfig": strict({"behavior": LABELS})}),
    ),
}


@cache
def objects(folder: str) -> tuple[Object, ...]:
    return tuple(yaml.safe_load_all(run("kubectl", "kustomize", FOLDER / folder)))


def one(overlay: str, kind: str) -> Object:
    (found,) = [x for x in objects(f"overlays/{overlay}") if x["kind"] == kind]
    return found


def pods(overlay: str) -> list[Object]:
    """The pod templates."""
    found = objects(f"overlays/{overlay}")
    return [x["spec"]["template"] for x in found if x["kind"] in ("Deployment", "Job")]


def settings(overlay: str) -> dict[str, str]:
    data: dict[str, str] = one(overlay, "ConfigMap")["data"]
    return data


def test_the_prometheus_rule_is_what_the_script_writes():
    assert prometheus_rule.OUTPUT.read_text() == prometheus_rule.as_text(), "run `make operations`"


@pytest.mark.operate
class TestSchemas:
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("folder", [*(f"overlays/{overlay}" for overlay in OVERLAYS), "hpa"])
    def test_kubernetes_knows_every_member(self, folder: str, version: str):
        import kubernetes_validate

        for document in objects(folder):
            if document["kind"] not in CUSTOM:
                kubernetes_validate.validate(document, version, strict=True)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_custom_resources_have_the_members_that_are_known_here(self, overlay: str):
        custom = [x for x in objects(f"overlays/{overlay}") if x["kind"] in CUSTOM]
        assert {x["kind"] for x in custom} == CUSTOM.keys() - (() if overlay in GPUS else {"ScaledObject"})
        for document in custom:
            jsonschema.validate(document["spec"], CUSTOM[document["kind"]])

    def test_a_member_that_does_not_exist_is_noticed(self):
        import kubernetes_validate

        wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selectors": {}}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"selectors": {}}, CUSTOM["ServiceMonitor"])


@pytest.mark.operate
@pytest.mark.parametrize("overlay", OVERLAYS)
class TestConsistency:
    def test_everything_selects_the_servers(self, overlay: str):
        deployment = one(overlay, "Deployment")
        assert deployment["spec"]["template"]["metadata"]["labels"] == SERVER
        assert deployment["spec"]["selector"]["matchLabels"] == SERVER
        assert one(overlay, "Service")["spec"]["selector"] == SERVER
        assert one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == SERVER
        (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"] == SERVER
        service = one(overlay, "Service")["metadata"]["labels"]
        assert one(overlay, "ServiceMonitor")["spec"]["selector"]["matchLabels"] == service

    def test_pods_are_confined(self, overlay: str):
        """The `restricted` profile of the pod security standards, and a root file system that cannot be written."""
        for pod in pods(overlay):
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert spec["automountServiceAccountToken"] is False
            for container in (*spec.get("initContainers", ()), *spec["containers"]):
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
            kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
            assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret"}

    def test_nothing_may_be_called_from_a_pod(self, overlay: str):
        spec = one(overlay, "NetworkPolicy")["spec"]
        assert "Egress" in spec["policyTypes"]
        assert not spec.get("egress")
        for pod in pods(overlay):
            assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()

    def test_the_settings_are_the_servers_and_nothing_else_looks_like_one(self, overlay: str, monkeypatch):
        given = settings(overlay)
        known = {f"PID_{name.upper()}" for name in Settings.model_fields}
        assert {name for name in given if name.startswith("PID_")} <= known
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert Settings().bundle == Path(given["PID_BUNDLE"])  # type: ignore[call-arg]  # from the environment
        for pod in pods(overlay):
            assert pod["spec"].get("enableServiceLinks") is False  # else PID_PORT would be tcp://…

    def test_a_pod_is_given_longer_to_end_than_it_takes_to_drain(self, overlay: str):
        spec = one(overlay, "Deployment")["spec"]["template"]["spec"]
        (server,) = spec["containers"]
        before = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = float(settings(overlay)["PID_DRAIN_DELAY"]) + float(settings(overlay)["PID_DRAIN_LIMIT"])
        assert spec["terminationGracePeriodSeconds"] > before + drain

    def test_probes_ask_what_there_is(self, overlay: str):
        from server.http.routes import router

        (server,) = one(overlay, "Deployment")["spec"]["template"]["spec"]["containers"]
        paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["path"] in paths
            assert server[probe]["httpGet"]["port"] == server["ports"][0]["name"]
        assert one(overlay, "ServiceMonitor")["spec"]["endpoints"][0]["path"] in paths

    def test_the_bundle_lies_on_a_volume_that_the_server_cannot_write(self, overlay: str):
        (server,) = one(overlay, "Deployment")["spec"]["template"]["spec"]["containers"]
        (mount,) = [mount for mount in server["volumeMounts"] if mount["mountPath"] == "/bundles"]
        assert mount["readOnly"]
        assert settings(overlay)["PID_BUNDLE"].startswith("/bundles/")


@pytest.mark.operate
@pytest.mark.parametrize("overlay", GPUS)
class TestGpus:
    def test_job_and_server_run_on_the_same_nodes_with_one_gpu(self, overlay: str):
        job, server = one(overlay, "Job"), one(overlay, "Deployment")
        nodes = [x["spec"]["template"]["spec"]["affinity"] for x in (job, server)]
        assert nodes[0] == nodes[1]
        assert overlay.upper() in str(nodes[0]).replace("-", "").upper()
        for x in (job, server):
            (container,) = x["spec"]["template"]["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"

    def test_the_bundle_is_kept_under_decoder_gpu_and_tensorrt(self, overlay: str):
        given = settings(overlay)
        target = TARGETS[given["TARGET"]]
        assert target.name == overlay
        pins = (ROOT / "docker/requirements-gpu.txt").read_text()
        (version,) = re.findall(rf"^{given['ENGINE_PACKAGE']}==([\d.]+)", pins, re.MULTILINE)
        assert given["ENGINE_PACKAGE"].startswith(f"{target.compilers[0]}-cu")
        key = f"{given['ENGINE_PACKAGE']}-{version}"
        assert given["PID_BUNDLE"] == f"/bundles/{given['DECODER']}/{overlay}/{key}"

    def test_the_builder_is_called_as_it_can_be(self, overlay: str, tmp_path: Path):
        (build,) = one(overlay, "Job")["spec"]["template"]["spec"]["containers"]
        (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / "python").chmod(0o755)
        bundle = tmp_path / "a/b"
        environment = {**settings(overlay), "PID_BUNDLE": str(bundle), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [*build["command"], *build["args"]]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        assert said[0] == "build_engines.py"
        parsed = build_engines._parser().parse_args(said[1:])
        assert (parsed.target, parsed.decoder, parsed.output) == (overlay, "flux-2kto4k-v1.5", bundle)
        assert str(parsed.checkpoint).startswith("/checkpoints/")
        unfinished = bundle.with_name("b" + SUFFIX)
        unfinished.mkdir(exist_ok=True)
        (unfinished / "build.json").touch()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        assert again == ["build_engines.py", "--resume", str(unfinished)]
        bundle.mkdir()
        (bundle / "manifest.json").touch()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert again == f"{bundle} is there.\n"

    def test_a_key_that_is_not_the_images_tensorrt_is_refused(self, overlay: str):
        (check,) = one(overlay, "Job")["spec"]["template"]["spec"]["initContainers"]
        import numpy

        for version, status in ((numpy.__version__, 0), ("0.1", 1)):
            environment = {"ENGINE_PACKAGE": "numpy", "PID_BUNDLE": f"/bundles/x/{overlay}/numpy-{version}"}
            command = [sys.executable, *check["command"][1:], *check["args"]]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == status
            assert ("make its last part" in done.stderr) == bool(status)

    def test_keys_are_wanted(self, overlay: str):
        spec = one(overlay, "Deployment")["spec"]["template"]["spec"]
        (mount,) = [x for x in spec["containers"][0]["volumeMounts"] if x["name"] == "keys"]
        assert settings(overlay)["PID_API_KEYS"].startswith(mount["mountPath"] + "/")

    def test_the_autoscaler_reads_what_is_there(self, overlay: str):
        from docker.grafana.dashboard import metric_helps, names_in

        scaled = one(overlay, "ScaledObject")["spec"]
        assert scaled["scaleTargetRef"]["name"] == one(overlay, "Deployment")["metadata"]["name"]
        assert "replicas" not in one(overlay, "Deployment")["spec"]
        for trigger in scaled["triggers"]:
            assert names_in(trigger["metadata"]["query"]) <= metric_helps().keys()
        (plain,) = objects("hpa")
        assert plain["spec"]["maxReplicas"] == scaled["maxReplicaCount"]
        assert plain["spec"]["behavior"] == scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


@pytest.mark.operate
def test_the_demos_bundle_is_built_by_a_command_that_can_be():
    (bundle,) = one("cpu-demo", "Deployment")["spec"]["template"]["spec"]["initContainers"]
    parsed = build_engines._parser().parse_args(shlex.split(shlex.join(bundle["command"]))[2:])
    assert str(parsed.output) == settings("cpu-demo")["PID_BUNDLE"]
