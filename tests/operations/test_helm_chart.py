"""The Helm chart with every kind of GPU, source of bundles and feature."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

import build_engines
from docker.helm.manifests import CHART, VALUES
from engines import __version__
from engines.compile.planning.targets import TARGETS
from server.command_line import read_settings
from server.flags import unknown_variables
from server.settings import Settings
from tests.operations.helm_values import EGRESS, FEATURES, GATEWAY, HASH, SOURCES, merged, values
from tests.operations.kubernetes_objects import (
    VERSIONS,
    Object,
    environment,
    only,
    pods,
    server_pod,
    template,
    validate,
)
from tests.programs import ROOT, run

pytestmark = pytest.mark.operate


def documented() -> list[Object]:
    """Return the values in docs/operations.md."""
    text = (ROOT / "docs/operations.md").read_text()
    blocks = re.findall(r"```yaml\n# values\.yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4  # all that there are, so that a changed heading does not exclude one from the tests
    return [yaml.safe_load(block) for block in blocks]


class TestValidity:
    def check(self, objects: list[Object], versions: tuple[str, ...] = VERSIONS) -> None:
        for document in objects:
            for version in versions:
                validate(document, version)
        names = [(x["kind"], x["metadata"]["name"]) for x in objects]
        assert len(set(names)) == len(names)
        for pod in pods(objects):
            claims = [
                v["persistentVolumeClaim"]["claimName"]
                for v in pod["spec"]["volumes"]
                if len(v) > 1 and "persistentVolumeClaim" in v
            ]
            assert len(set(claims)) == len(claims)  # some drivers never mount a claim twice in one pod
            mounted = {
                m["name"]
                for c in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])
                for m in c.get("volumeMounts", ())
            }
            assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}

    @pytest.mark.parametrize("gpu", ["none", *sorted(TARGETS.keys() - {"cpu"})])
    @pytest.mark.parametrize("source", SOURCES)
    def test_every_source_and_gpu(self, source: str, gpu: str):
        versions = VERSIONS[-1:] if source == "image" else VERSIONS  # older schemas have no such volumes
        self.check(template(values(source, {"gpu": {"type": gpu, "count": 1 if gpu == "none" else 2}})), versions)

    @pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids="+".join)
    def test_every_pair_of_features(self, pair: tuple[str, str]):
        self.check(template(values("claim", *(FEATURES[name] for name in pair))), VERSIONS[-1:])

    @pytest.mark.parametrize("name", FEATURES)
    def test_every_feature(self, name: str):
        self.check(template(values("demo", FEATURES[name])))

    def test_everything_at_once(self):
        every = merged(*FEATURES.values(), {"networkPolicy": {"enabled": True}, "gpu": {"type": "h200"}})
        self.check(template(merged({**every, "bundles": SOURCES}, EGRESS)), VERSIONS[-1:])

    @pytest.mark.parametrize("index", range(len(documented())))
    def test_documented_values(self, index: int):
        objects = template(documented()[index])
        self.check(objects, VERSIONS[-1:])
        assert not unknown_variables(Settings, "PID_", environment(objects))

    def test_without_features_there_are_only_core_kinds(self):
        assert {x["kind"] for x in template(values())} == {
            "Deployment",
            "NetworkPolicy",
            "PodDisruptionBudget",
            "Service",
        }

    @pytest.mark.parametrize("name", sorted(path.name for path in VALUES.iterdir()))
    def test_lint_has_no_warnings(self, name: str, tmp_path: Path):
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values("demo", GATEWAY, {"ingress": {"hosts": ["a"]}})))
        run("helm", "lint", "--strict", CHART, "--values", tmp_path / "values.yaml", "--values", VALUES / name)


class TestBundles:
    def test_the_server_reads_all_of_them_by_name(self):
        objects = template({**values("http"), "bundles": SOURCES})
        bundles = read_settings([], environment(objects)).bundle
        assert bundles.keys() == SOURCES.keys()
        (server,) = server_pod(objects)["containers"]
        mounts = {Path(mount["mountPath"]): mount for mount in server["volumeMounts"]}
        for path in bundles.values():
            (mount,) = [mounts[folder] for folder in path.parents if folder in mounts]
            assert mount["readOnly"]

    def test_archives_are_fetched_to_the_directory_that_the_server_reads(self):
        http = SOURCES["http"]["http"]
        objects = template(values("http"))
        (container,) = server_pod(objects)["initContainers"]
        (path,) = read_settings([], environment(objects)).bundle.values()
        assert container["command"] == ["python", "fetch_bundle.py", http["url"], http["sha256"], str(path)]
        assert "env" not in container

    def test_archives_can_need_a_token_a_proxy_and_a_certificate(self):
        http = {"tokenSecret": {"name": "files", "key": "token"}, "caConfigMap": {"name": "ca", "key": "root.pem"}}
        env = [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]
        objects = template(values("http", {"bundles": {"flux": {"http": http}}, "env": env}))
        (container,) = server_pod(objects)["initContainers"]
        token, certificates, proxy = container["env"]
        assert token == {"name": "PID_FETCH_TOKEN", "valueFrom": {"secretKeyRef": http["tokenSecret"]}}
        assert proxy == env[0]
        path = Path(certificates["value"])
        assert certificates["name"] == "SSL_CERT_FILE"
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == str(path.parent)]
        (volume,) = [volume for volume in server_pod(objects)["volumes"] if volume["name"] == mount["name"]]
        assert volume["configMap"] == {"name": "ca", "items": [{"key": "root.pem", "path": path.name}]}

    def test_the_address_of_an_archive_can_come_from_a_secret(self):
        source = {"http": {"urlSecret": {"name": "files", "key": "url"}, "sha256": HASH}}
        (container,) = server_pod(template({**values("http"), "bundles": {"flux": source}}))["initContainers"]
        (variable,) = container["env"]
        assert variable["valueFrom"] == {"secretKeyRef": source["http"]["urlSecret"]}
        assert container["command"][2] == f"$({variable['name']})"  # Kubernetes replaces it

    @pytest.mark.parametrize(("gpu", "target"), [("none", "cpu"), ("cuda", "cuda"), ("h200", "cuda")])
    def test_the_bundled_decoder_is_built_without_engines(self, gpu: str, target: str):
        (container,) = server_pod(template(values("demo", {"gpu": {"type": gpu}})))["initContainers"]
        assert build_engines.main([*container["command"][2:], "--dry-run"]) == 0
        assert container["command"][container["command"].index("--target") + 1] == target


class TestServer:
    def test_settings_are_text_that_the_server_reads(self):
        settings = {
            "max-pixels": 16777216,
            "sizes": ["1024x1024", "2048x1024"],
            "playground": False,
            "batch-share": 0.25,
        }
        read = read_settings([], environment(template(values("claim", {"settings": settings}))))
        assert (read.max_pixels, read.playground, read.batch_share) == (16777216, False, 0.25)
        assert [str(size) for size in read.sizes or ()] == settings["sizes"]

    def test_the_grace_period_follows_the_settings(self):
        objects = template(values("claim", {"settings": {"drain-delay": 12.5, "drain-limit": 300}}))
        assert 12.5 + 300 < server_pod(objects)["terminationGracePeriodSeconds"] < 12.5 + 300 + 15
        (server,) = server_pod(objects)["containers"]
        assert "lifecycle" not in server  # the server itself delays: a hook would delay twice

    @pytest.mark.parametrize("source", ["claim", "build"])
    def test_a_rollout_may_take_as_long_as_the_start_and_the_build(self, source: str):
        start = {"startSeconds": 3000, "builder": {"seconds": 20000}}
        deployment = only(template(values(source, start)), "Deployment")["spec"]
        probe = deployment["template"]["spec"]["containers"][0]["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == 3000
        needed = 3000 + (20000 if source == "build" else 0)
        assert needed < deployment["progressDeadlineSeconds"] < needed + 3600

    def test_all_gpus_of_a_pod_are_used(self):
        objects = template(values("claim", {"gpu": {"type": "h200", "count": 4}}))
        assert read_settings([], environment(objects)).devices == "cuda:0,cuda:1,cuda:2,cuda:3"
        assert server_pod(objects)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"

    def test_a_mig_profile_replaces_the_gpu(self):
        gpu = {"type": "h200", "resource": "nvidia.com/mig-3g.71gb", "product": "NVIDIA-H200-MIG-3g.71gb"}
        spec = server_pod(template(values("claim", {"gpu": gpu})))
        limits = spec["containers"][0]["resources"]["limits"]
        assert {name: count for name, count in limits.items() if "/" in name} == {"nvidia.com/mig-3g.71gb": "1"}
        assert spec["nodeSelector"]["nvidia.com/gpu.product"] == "NVIDIA-H200-MIG-3g.71gb"

    @pytest.mark.parametrize(("gpu", "target"), [("none", "cpu"), ("h200", "gpu")])
    def test_the_image_has_the_version_of_the_chart(self, gpu: str, target: str):
        (server,) = server_pod(template(values("claim", {"gpu": {"type": gpu}})))["containers"]
        assert server["image"] == f"r.example/pid:{__version__}-{target}"

    def test_given_resources_replace_the_defaults_of_the_same_name(self):
        def resources(**given: Object) -> Object:
            return server_pod(template(values("claim", {"resources": given})))["containers"][0]["resources"]

        assert resources() == {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "16Gi"}}
        assert resources(requests={"cpu": "1"}) == {
            "requests": {"cpu": "1", "memory": "8Gi"},
            "limits": {"memory": "16Gi"},
        }
        assert resources(limits={"memory": "4Gi"})["requests"] == {"cpu": "4"}  # 8Gi would be more than the limit

    def test_the_demo_fits_on_a_small_machine(self):
        (server,) = server_pod(template(values("demo")))["containers"]
        assert server["resources"]["requests"] == {"cpu": "1", "memory": "1Gi"}
        both = {"bundles": {"demo": SOURCES["demo"]}}
        (server,) = server_pod(template(values("claim", both)))["containers"]
        assert server["resources"]["requests"]["memory"] == "8Gi"

    def test_the_cluster_can_choose_the_user(self):
        spec = server_pod(template(values("claim", {"podSecurityContext": {"runAsUser": 7, "fsGroup": None}})))
        context = spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"]) == (7, 10001)
        assert "fsGroup" not in context
        assert context["runAsNonRoot"]

    def test_labels_of_pods_do_not_replace_those_of_selectors(self):
        labels = {"podLabels": {"app.kubernetes.io/name": "other", "team": "a"}}
        deployment = only(template(values("claim", labels)), "Deployment")["spec"]
        expected = {**deployment["selector"]["matchLabels"], "team": "a"}
        assert deployment["template"]["metadata"]["labels"] == expected

    @pytest.mark.parametrize("release", ["1e5", "123", "0x1f"])
    def test_names_remain_text(self, release: str):
        objects = template(values("build", *FEATURES.values(), {"fullnameOverride": ""}), release=release)
        for document in objects:
            assert document["metadata"]["name"].startswith(release)
            assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == release
            validate(document, VERSIONS[-1])

    def test_all_objects_can_have_another_name(self):
        objects = template(values("build", *FEATURES.values(), {"fullnameOverride": "decoder"}))
        assert {x["metadata"]["name"].partition("-")[0] for x in objects} == {"decoder"}

    def test_a_digest_takes_precedence_over_the_tag(self):
        image = {"image": {"tag": "x", "digest": f"sha256:{HASH}"}}
        assert server_pod(template(values("claim", image)))["containers"][0]["image"] == f"r.example/pid@sha256:{HASH}"

    def test_inline_keys_can_be_read_by_the_server(self, tmp_path: Path):
        from server.http.auth import read_keys

        keys = {"alice": "0123456789abcdef", "bob": "Zm9yIGV4YW1wbGUgb25seQ=="}
        objects = template(values("claim", {"apiKeys": {"keys": keys}}))
        secret = only(objects, "Secret")
        (tmp_path / "keys").write_text(secret["stringData"]["keys"])
        assert read_keys(tmp_path / "keys")
        (volume,) = [volume for volume in server_pod(objects)["volumes"] if volume["name"] == "keys"]
        assert volume["secret"]["secretName"] == secret["metadata"]["name"]

    def test_captions_use_existing_flags(self):
        settings = read_settings([], environment(template(values("claim", FEATURES["captions"], FEATURES["cache"]))))
        assert (str(settings.text_encoder), str(settings.caption_prefix)) == (
            "/claims/shared/gemma",
            "/claims/shared/prefix.txt",
        )
        assert str(settings.caption_cache) == "/cache/captions"


def test_the_chart_has_the_version_of_the_project():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__
