"""Pods of the rendered manifests, run by `podman kube play`.

Differences to Kubernetes, with podman 4.3: it knows only the liveness probe, does not know names of ports, restarts
init containers under the policy `Always`, ignores fsGroup and, without systemd, does not run probes: the tests do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.operations.helm_values import values
from tests.operations.kubernetes_objects import Object, manifest, only, template
from tests.operations.podman import CPU_IMAGE, Container, Podman
from tests.waiting import until

pytestmark = pytest.mark.operate

# podman runs the probe as `curl` in the container.
CURL = f"""
FROM {CPU_IMAGE}
USER 0:0
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends curl
USER 10001:10001
"""
DECODE = """
import sys, urllib.request, numpy, safetensors.numpy
body = safetensors.numpy.save({"latent": numpy.zeros((16, 16, 16), numpy.float32)})
headers = {"Content-Type": "application/x-safetensors"}
urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000/decode", body, headers))
"""


@pytest.fixture(scope="module")
def image(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CPU image with curl, under a name that needs no registry."""
    path = tmp_path_factory.mktemp("curl") / "Containerfile"
    path.write_text(CURL)
    podman("build", "--isolation", "chroot", "--format", "docker", "--tag", "localhost/with-curl", "--file", path)
    return "localhost/with-curl"


def pod_of(workload: Object, name: str, image: str) -> Object:
    """Return the pod of a Deployment, with `image` in all containers."""
    template = copy.deepcopy(workload["spec"]["template"])
    spec = template["spec"]
    spec["restartPolicy"] = "OnFailure"
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        container["image"] = image
        if "livenessProbe" in container:
            (port,) = container["ports"]
            assert container["livenessProbe"]["httpGet"]["port"] == port["name"]
            container["livenessProbe"]["httpGet"]["port"] = port["containerPort"]
    metadata = {"name": name, "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@contextmanager
def playing(podman: Podman, pod: Object, folder: Path) -> Iterator[Container]:
    """Run a pod; yield its only container that is not an init container."""
    path = folder / "pod.yaml"
    path.write_text(yaml.safe_dump(pod))
    name = pod["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    try:
        podman("kube", "play", path)
        yield Container(podman, f"{name}-{container['name']}")
    finally:
        podman("pod", "rm", "--force", name)
        podman("volume", "prune", "--force")


def healthy(podman: Podman, container: Container) -> bool:
    """Run the liveness probe once."""
    return podman.attempt("healthcheck", "run", container.name).returncode == 0


class TestDemo:
    """docker/kubernetes/cpu-demo.yaml."""

    @pytest.fixture
    def pod(self, image: str) -> Object:
        return pod_of(only(manifest("cpu-demo"), "Deployment"), "demo", image)

    def test_the_pod_starts_decodes_and_drains(self, podman: Podman, pod: Object, tmp_path: Path):
        with playing(podman, pod, tmp_path) as container:
            until(lambda: "warm-up took" in container.logs(), "the server to be ready", 180)
            assert healthy(podman, container)
            container.run("python", "-c", DECODE)
            status = dict(line.split(":\t", 1) for line in container.run("cat", "/proc/1/status").splitlines())
            assert int(status["CapBnd"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert podman.attempt("exec", container.name, "touch", "/app/x").returncode == 1
            assert container.stop() == 0

    def test_a_pod_whose_device_fails_restarts_and_becomes_ready(self, podman: Podman, pod: Object, tmp_path: Path):
        (server,) = pod["spec"]["containers"]
        faults = {"FAULTS": "poison-device", "ALLOW_FAULTS": "true", "HOST": "127.0.0.1", "FAILURE_EXIT_DELAY": "10"}
        server["env"] += [{"name": f"PID_{name}", "value": value} for name, value in faults.items()]
        with playing(podman, pod, tmp_path) as container:
            until(lambda: "warm-up took" in container.logs(), "the server to be ready", 180)
            assert healthy(podman, container)
            failed = podman.attempt("exec", container.name, "python", "-c", DECODE)
            assert "503" in failed.stderr
            assert not healthy(podman, container)
            until(lambda: container.logs().count("warm-up took") == 2, "the restarted server to be ready", 180)
            assert healthy(podman, container)


def test_the_first_pod_builds_the_bundle_that_all_serve(podman: Podman, image: str, tmp_path: Path):
    source = {"build": {"decoder": "dct-demo", "claim": "pid-bundles", "checkpoint": "none"}}
    objects = template(values("build", {"bundles": {"flux": source}, "resources": {"limits": {"memory": "2Gi"}}}))
    pod = pod_of(only(objects, "Deployment"), "build", image)
    (build,) = pod["spec"]["initContainers"]
    build["resources"] = {"limits": {"memory": "2Gi"}}
    build["args"] = [argument for argument in build["args"] if not argument.startswith("--checkpoint=")]
    podman("volume", "create", "pid-bundles")
    mountpoint = podman("volume", "inspect", "pid-bundles", "--format", "{{.Mountpoint}}")
    Path(mountpoint).chmod(0o777)  # instead of fsGroup
    bundle = build["env"][0]["value"]
    later = copy.deepcopy(pod)
    later["metadata"]["name"] = "later"
    del later["spec"]["containers"][0]["ports"]  # podman would bind the port on the host again
    with playing(podman, pod, tmp_path) as container:
        until(lambda: "warm-up took" in container.logs(), "the server to be ready", 180)
        container.run("python", "-c", DECODE)
        built = container.run("stat", "--format", "%i %y", f"{bundle}/manifest.json")
        with playing(podman, later, tmp_path) as container_later:
            until(lambda: "warm-up took" in container_later.logs(), "the second server to be ready", 180)
            assert container_later.run("stat", "--format", "%i %y", f"{bundle}/manifest.json") == built
