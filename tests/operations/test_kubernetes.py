"""Every manifest in docker/kubernetes: valid against the Kubernetes schemas and consistent with the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import build_engines
from docker.helm.manifests import COPIES, MANIFESTS, OPTIONS, render
from engines.compile.planning.targets import TARGETS
from server.command_line import read_settings
from server.http.routes import router
from server.settings import Settings
from tests.operations.kubernetes_objects import (
    VERSIONS,
    Object,
    environment,
    manifest,
    only,
    pods,
    server_pod,
    validate,
)
from tests.programs import ROOT, program, run

GPUS = ("rtx5090", "h200", "gb200")
NAMES = ("cpu-demo", *GPUS)
RELEASE = {"app.kubernetes.io/name": "pid", "app.kubernetes.io/instance": "pid"}
SERVER = {**RELEASE, "app.kubernetes.io/component": "server"}
CONFINED_VOLUMES = {"emptyDir", "persistentVolumeClaim", "secret"}


@pytest.mark.parametrize("source", COPIES, ids=lambda path: path.name)
def test_files_in_the_chart_are_up_to_date(source: Path):
    assert COPIES[source].read_bytes() == source.read_bytes(), "run `make operations`"


@pytest.mark.operate
@pytest.mark.parametrize("name", NAMES)
def test_the_committed_manifest_is_up_to_date(name: str):
    assert (MANIFESTS / f"{name}.yaml").read_text() == render(program("helm"), name), "run `make operations`"


def test_there_is_one_manifest_per_kind_of_gpu():
    assert {path.stem for path in MANIFESTS.iterdir()} == set(NAMES) == OPTIONS.keys()


@pytest.mark.operate
class TestSchemas:
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("name", NAMES)
    def test_objects_are_valid(self, name: str, version: str):
        for document in manifest(name):
            validate(document, version)

    def test_an_unknown_member_is_rejected(self):
        import jsonschema
        import kubernetes_validate

        wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selectors": {}}}
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(wrong, VERSIONS[-1])
        with pytest.raises(jsonschema.ValidationError):
            validate({"kind": "ServiceMonitor", "spec": {"selectors": {}}}, VERSIONS[-1])


@pytest.mark.operate
@pytest.mark.parametrize("name", NAMES)
def test_the_documented_kustomization_changes_the_image_and_a_setting(name: str, tmp_path: Path):
    text = (ROOT / "docs/operations.md").read_text()
    (kustomization,) = re.findall(r"```yaml\n(# kustomization\.yaml\n.*?)```", text, re.DOTALL)
    changed = yaml.safe_load(kustomization)
    (image,) = changed["images"]
    (tmp_path / "kustomization.yaml").write_text(kustomization.replace("h200.yaml", f"{name}.yaml"))
    (tmp_path / f"{name}.yaml").write_text((MANIFESTS / f"{name}.yaml").read_text())
    before, after = manifest(name), list(yaml.safe_load_all(run("kubectl", "kustomize", tmp_path)))
    for pod in pods(after):
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            assert container["image"] == f"{image['newName']}:{image['newTag']}"
    new = environment(after)
    assert new == {**environment(before), "PID_QUEUE_SECONDS": "30"} != environment(before)
    assert len(after) == len(before)


@pytest.mark.parametrize("name", GPUS)
def test_servers_share_their_compiled_code_and_can_write_it(name: str):
    spec = server_pod(manifest(name))
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "cache"]
    claim = volume["persistentVolumeClaim"]
    assert not claim.get("readOnly")
    (found,) = [x for x in manifest(name) if x["metadata"]["name"] == claim["claimName"]]
    assert found["spec"]["accessModes"] == ["ReadWriteMany"]
    (server,) = spec["containers"]
    assert {"name": "cache", "mountPath": "/cache"} in server["volumeMounts"]


@pytest.mark.parametrize("name", NAMES)
class TestConsistency:
    def test_all_selectors_match_the_servers(self, name: str):
        objects = manifest(name)
        deployment = only(objects, "Deployment")
        assert deployment["spec"]["template"]["metadata"]["labels"] == SERVER
        assert deployment["spec"]["selector"]["matchLabels"] == SERVER
        assert only(objects, "Service")["spec"]["selector"] == SERVER
        assert only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == SERVER
        (spread,) = server_pod(objects)["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"] == SERVER

    def test_pods_are_confined(self, name: str):
        """Pods follow the `restricted` pod security standard and have a read-only root file system."""
        for pod in pods(manifest(name)):
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert spec["automountServiceAccountToken"] is False
            for container in (*spec.get("initContainers", ()), *spec["containers"]):
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
            assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= CONFINED_VOLUMES

    def test_pods_have_no_egress(self, name: str):
        spec = only(manifest(name), "NetworkPolicy")["spec"]
        assert "Egress" in spec["policyTypes"]
        assert not spec.get("egress")
        for pod in pods(manifest(name)):
            assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()

    def test_settings_are_valid_and_no_other_variable_looks_like_one(self, name: str):
        variables = environment(manifest(name))
        known = {f"PID_{field.upper()}" for field in Settings.model_fields}
        assert variables.keys() <= known
        (bundle,) = read_settings([], variables).bundle.items()
        assert f"{bundle[0]}={bundle[1]}" == variables["PID_BUNDLE"]
        for pod in pods(manifest(name)):
            assert pod["spec"].get("enableServiceLinks") is False  # otherwise Kubernetes sets PID_PORT=tcp://…

    def test_the_termination_grace_period_is_longer_than_draining(self, name: str):
        settings = read_settings([], environment(manifest(name)))
        assert server_pod(manifest(name))["terminationGracePeriodSeconds"] > settings.drain_delay + settings.drain_limit

    def test_probes_use_existing_paths(self, name: str):
        (server,) = server_pod(manifest(name))["containers"]
        paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["path"] in paths
            assert server[probe]["httpGet"]["port"] == server["ports"][0]["name"]

    def test_the_server_mounts_the_bundle_read_only(self, name: str):
        (server,) = server_pod(manifest(name))["containers"]
        (path,) = read_settings([], environment(manifest(name))).bundle.values()
        (mount,) = [mount for mount in server["volumeMounts"] if path.is_relative_to(mount["mountPath"])]
        assert mount["readOnly"]


@pytest.mark.parametrize("name", GPUS)
class TestGpus:
    def test_prometheus_finds_the_metrics(self, name: str):
        monitor, service = only(manifest(name), "ServiceMonitor")["spec"], only(manifest(name), "Service")
        assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"] == RELEASE
        (endpoint,) = monitor["endpoints"]
        assert endpoint["path"] in {route.path for route in router.routes}  # type: ignore[attr-defined]
        assert endpoint["port"] == service["spec"]["ports"][0]["name"]

    def test_servers_run_on_nodes_with_the_gpu(self, name: str):
        product = server_pod(manifest(name))["nodeSelector"]["nvidia.com/gpu.product"]
        assert name.upper() in product.replace("-", "").upper()

    def test_the_path_of_the_bundle_names_decoder_gpu_and_tensorrt(self, name: str):
        target = TARGETS[name]
        (bundle,) = read_settings([], environment(manifest(name))).bundle.items()
        decoder, path = bundle
        assert path.parts[-3:-1] == (decoder, target.name)
        pins = (ROOT / "docker/requirements-gpu.txt").read_text()
        pinned = dict(re.findall(r"^(tensorrt[a-z0-9-]*)==([\d.]+)", pins, re.MULTILINE))
        (package,) = [package for package in pinned if package.startswith(f"{target.packages[0]}-cu")]
        assert re.fullmatch(f"{re.escape(f'{package}-{pinned[package]}')}-[0-9a-f]{{8}}", path.name)

    def test_api_keys_are_required(self, name: str):
        (mount,) = [x for x in server_pod(manifest(name))["containers"][0]["volumeMounts"] if x["name"] == "keys"]
        assert environment(manifest(name))["PID_API_KEYS"].startswith(mount["mountPath"] + "/")


def test_the_demo_builds_the_bundle_that_it_serves(capsys: pytest.CaptureFixture[str]):
    (bundle,) = server_pod(manifest("cpu-demo"))["initContainers"]
    python, script, *arguments = bundle["command"]
    assert (python, script) == ("python", "build_engines.py")
    assert build_engines.main([*arguments, "--dry-run"]) == 0
    assert environment(manifest("cpu-demo"))["PID_BUNDLE"].partition("=")[2] in capsys.readouterr().out


def test_the_demo_needs_no_claims_secrets_and_operators():
    objects: tuple[Object, ...] = manifest("cpu-demo")
    assert {x["kind"] for x in objects} == {
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
    }
    assert all(volume.keys() == {"name", "emptyDir"} for volume in server_pod(objects)["volumes"])
