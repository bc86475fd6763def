"""Every overlay, built by kustomize: valid against the Kubernetes schemas and consistent with the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import build_engines
from docker.grafana.dashboard import metric_help, series_names
from docker.kubernetes import prometheus_rule
from engines.compile.planning.paths import SUFFIX
from engines.compile.planning.targets import TARGETS
from server.command_line import read_settings
from server.http.routes import router
from server.settings import Settings
from tests.programs import ROOT, run

FOLDER = ROOT / "docker/kubernetes"
GPUS = ("rtx5090", "h200", "gb200")
OVERLAYS = ("cpu-demo", *GPUS)
VERSIONS = ("1.30", "1.37")  # of Kubernetes
SERVER = {"app.kubernetes.io/name": "pid", "app.kubernetes.io/component": "server"}

Object = dict[str, Any]


def strict(required: dict[str, Any], **optional: Any) -> Object:
    """Return a JSON schema of an object with these members and no others."""
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
# Schemas of the custom resources, with the members used here; the Kubernetes schemas do not include them.
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
    """Return the objects that kustomize builds from a directory of docker/kubernetes."""
    return tuple(yaml.safe_load_all(run("kubectl", "kustomize", FOLDER / folder)))


def find_one(overlay: str, kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = [x for x in objects(f"overlays/{overlay}") if x["kind"] == kind]
    return found


def pods(overlay: str) -> list[Object]:
    """Return the pod templates of an overlay."""
    return [x["spec"]["template"] for x in objects(f"overlays/{overlay}") if x["kind"] in ("Deployment", "Job")]


def settings(overlay: str) -> dict[str, str]:
    """Return the environment variables from the ConfigMap."""
    data: dict[str, str] = find_one(overlay, "ConfigMap")["data"]
    return data


def test_the_committed_prometheus_rule_is_up_to_date():
    assert prometheus_rule.OUTPUT.read_text() == prometheus_rule.as_text(), "run `make operations`"


@pytest.mark.operate
class TestSchemas:
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("folder", [*(f"overlays/{overlay}" for overlay in OVERLAYS), "hpa"])
    def test_objects_are_valid(self, folder: str, version: str):
        import kubernetes_validate

        for document in objects(folder):
            if document["kind"] not in CUSTOM:
                kubernetes_validate.validate(document, version, strict=True)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_custom_resources_are_valid(self, overlay: str):
        import jsonschema

        custom = [x for x in objects(f"overlays/{overlay}") if x["kind"] in CUSTOM]
        assert {x["kind"] for x in custom} == CUSTOM.keys() - (() if overlay in GPUS else {"ScaledObject"})
        for document in custom:
            jsonschema.validate(document["spec"], CUSTOM[document["kind"]])

    def test_an_unknown_member_is_rejected(self):
        import jsonschema
        import kubernetes_validate

        wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selectors": {}}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"selectors": {}}, CUSTOM["ServiceMonitor"])


@pytest.mark.operate
@pytest.mark.parametrize("overlay", GPUS)
def test_servers_share_their_compiled_code_and_can_write_it(overlay: str):
    spec = find_one(overlay, "Deployment")["spec"]["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "cache"]
    claim = volume["persistentVolumeClaim"]
    assert not claim.get("readOnly")
    (found,) = [x for x in objects(f"overlays/{overlay}") if x["metadata"]["name"] == claim["claimName"]]
    assert found["spec"]["accessModes"] == ["ReadWriteMany"]
    (server,) = spec["containers"]
    assert {"name": "cache", "mountPath": "/cache"} in server["volumeMounts"]


@pytest.mark.operate
@pytest.mark.parametrize("overlay", OVERLAYS)
class TestConsistency:
    def test_all_selectors_match_the_servers(self, overlay: str):
        deployment = find_one(overlay, "Deployment")
        assert deployment["spec"]["template"]["metadata"]["labels"] == SERVER
        assert deployment["spec"]["selector"]["matchLabels"] == SERVER
        assert find_one(overlay, "Service")["spec"]["selector"] == SERVER
        assert find_one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == SERVER
        (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"] == SERVER
        service = find_one(overlay, "Service")["metadata"]["labels"]
        assert find_one(overlay, "ServiceMonitor")["spec"]["selector"]["matchLabels"] == service

    def test_pods_are_confined(self, overlay: str):
        """Pods follow the `restricted` pod security standard and have a read-only root file system."""
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

    def test_pods_have_no_egress(self, overlay: str):
        spec = find_one(overlay, "NetworkPolicy")["spec"]
        assert "Egress" in spec["policyTypes"]
        assert not spec.get("egress")
        for pod in pods(overlay):
            assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()

    def test_settings_are_valid_and_no_other_variable_looks_like_one(self, overlay: str, monkeypatch):
        variables = settings(overlay)
        known = {f"PID_{name.upper()}" for name in Settings.model_fields}
        assert {name for name in variables if name.startswith("PID_")} <= known
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert read_settings([]).bundle == {"": Path(variables["PID_BUNDLE"])}
        for pod in pods(overlay):
            assert pod["spec"].get("enableServiceLinks") is False  # otherwise Kubernetes sets PID_PORT=tcp://…

    def test_the_termination_grace_period_is_longer_than_draining(self, overlay: str):
        spec = find_one(overlay, "Deployment")["spec"]["template"]["spec"]
        (server,) = spec["containers"]
        before = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = float(settings(overlay)["PID_DRAIN_DELAY"]) + float(settings(overlay)["PID_DRAIN_LIMIT"])
        assert spec["terminationGracePeriodSeconds"] > before + drain

    def test_probes_use_existing_paths(self, overlay: str):
        (server,) = find_one(overlay, "Deployment")["spec"]["template"]["spec"]["containers"]
        paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["path"] in paths
            assert server[probe]["httpGet"]["port"] == server["ports"][0]["name"]
        assert find_one(overlay, "ServiceMonitor")["spec"]["endpoints"][0]["path"] in paths

    def test_the_server_mounts_the_bundle_read_only(self, overlay: str):
        (server,) = find_one(overlay, "Deployment")["spec"]["template"]["spec"]["containers"]
        (mount,) = [mount for mount in server["volumeMounts"] if mount["mountPath"] == "/bundles"]
        assert mount["readOnly"]
        assert settings(overlay)["PID_BUNDLE"].startswith("/bundles/")


@pytest.mark.operate
@pytest.mark.parametrize("overlay", GPUS)
class TestGpus:
    def test_job_and_server_run_on_the_same_kind_of_node_with_one_gpu(self, overlay: str):
        job, server = find_one(overlay, "Job"), find_one(overlay, "Deployment")
        nodes = [x["spec"]["template"]["spec"]["affinity"] for x in (job, server)]
        assert nodes[0] == nodes[1]
        assert overlay.upper() in str(nodes[0]).replace("-", "").upper()
        for x in (job, server):
            (container,) = x["spec"]["template"]["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"

    def test_the_path_of_the_bundle_names_decoder_gpu_and_tensorrt(self, overlay: str):
        variables = settings(overlay)
        target = TARGETS[variables["TARGET"]]
        assert target.name == overlay
        pins = (ROOT / "docker/requirements-gpu.txt").read_text()
        (pinned,) = re.findall(rf"^{variables['ENGINE_PACKAGE']}==([\d.]+)", pins, re.MULTILINE)
        assert variables["ENGINE_PACKAGE"].startswith(f"{target.compilers[0]}-cu")
        key = f"{variables['ENGINE_PACKAGE']}-{pinned}"
        assert variables["PID_BUNDLE"] == f"/bundles/{variables['DECODER']}/{overlay}/{key}"

    def test_the_job_builds_then_resumes_then_does_nothing(
        self, overlay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (build,) = find_one(overlay, "Job")["spec"]["template"]["spec"]["containers"]
        inputs = {"CHECKPOINT": tmp_path / "checkpoint.pth", "EMPTY_CAPTION": tmp_path / "empty.safetensors"}
        assert all(settings(overlay)[name].startswith("/checkpoints/") for name in inputs)
        assert "/checkpoints" in {mount["mountPath"] for mount in build["volumeMounts"]}
        (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')  # prints its arguments
        (tmp_path / "python").chmod(0o755)
        for path in inputs.values():
            path.touch()
        bundle = tmp_path / "a/b"
        environment = {
            **settings(overlay),
            **{name: str(path) for name, path in inputs.items()},
            "PID_BUNDLE": str(bundle),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }

        def start() -> str:
            command = [*build["command"], *build["args"]]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

        script, *arguments = start().split()
        assert script == "build_engines.py"
        assert build_engines.main([*arguments, "--dry-run"]) == 0
        plan = capsys.readouterr().out
        assert str(bundle) in plan
        assert overlay in plan.lower().replace(" ", "")
        unfinished = bundle.with_name("b" + SUFFIX)
        unfinished.mkdir(exist_ok=True)
        (unfinished / "build.json").touch()
        assert start().split() == ["build_engines.py", "--resume", str(unfinished)]
        bundle.mkdir()
        (bundle / "manifest.json").touch()
        assert start() == f"{bundle} already exists.\n"

    def test_the_job_rejects_a_path_for_another_tensorrt_version(self, overlay: str):
        (check,) = find_one(overlay, "Job")["spec"]["template"]["spec"]["initContainers"]
        for number, status in ((version("numpy"), 0), ("0.1", 1)):
            environment = {"ENGINE_PACKAGE": "numpy", "PID_BUNDLE": f"/bundles/x/{overlay}/numpy-{number}"}
            command = [sys.executable, *check["command"][1:], *check["args"]]
            checked = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert checked.returncode == status
            assert ("change its last part to numpy-" in checked.stderr) == bool(status)

    def test_api_keys_are_required(self, overlay: str):
        spec = find_one(overlay, "Deployment")["spec"]["template"]["spec"]
        (mount,) = [x for x in spec["containers"][0]["volumeMounts"] if x["name"] == "keys"]
        assert settings(overlay)["PID_API_KEYS"].startswith(mount["mountPath"] + "/")

    def test_the_autoscaler_reads_existing_metrics(self, overlay: str):
        scaled = find_one(overlay, "ScaledObject")["spec"]
        assert scaled["scaleTargetRef"]["name"] == find_one(overlay, "Deployment")["metadata"]["name"]
        assert "replicas" not in find_one(overlay, "Deployment")["spec"]
        tested = (ROOT / "docker/prometheus/tests.yml").read_text()  # with several devices and decoders
        for query in (trigger["metadata"]["query"] for trigger in scaled["triggers"]):
            assert series_names(query) <= metric_help().keys()
            assert query in tested
        (plain,) = objects("hpa")
        assert plain["spec"]["maxReplicas"] == scaled["maxReplicaCount"]
        assert plain["spec"]["behavior"] == scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


@pytest.mark.operate
def test_the_demo_builds_the_bundle_that_it_serves(capsys: pytest.CaptureFixture[str]):
    (bundle,) = find_one("cpu-demo", "Deployment")["spec"]["template"]["spec"]["initContainers"]
    python, script, *arguments = bundle["command"]
    assert (python, script) == ("python", "build_engines.py")
    assert build_engines.main([*arguments, "--dry-run"]) == 0
    assert settings("cpu-demo")["PID_BUNDLE"] in capsys.readouterr().out
