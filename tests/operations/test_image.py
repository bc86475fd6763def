"""The container images, built by buildah on Debian's Python, and the files that they are used with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from engines.bundled.decoder import DESCRIPTION
from loadtest.scenario import load_scenario
from server.settings import Settings
from tests.operations.podman import CPU_IMAGE, Podman
from tests.programs import ROOT, run

COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
MAX_BYTES = 950_000_000  # of the CPU image, without compression


class TestFiles:
    def test_everything_that_compose_mounts_exists(self):
        for name, service in COMPOSE["services"].items():
            for volume in service.get("volumes", ()):
                source = volume.split(":")[0]
                if source.startswith("."):
                    assert (ROOT / "docker" / source).exists(), (name, source)
                elif not source.startswith("$"):
                    assert source in COMPOSE["volumes"], (name, source)

    def test_containers_are_confined_and_publish_ports_on_loopback_only(self):
        for name, service in COMPOSE["services"].items():
            if "pid-decode-server" in service["image"]:
                assert service["read_only"], name
                assert service["cap_drop"] == ["ALL"], name
                assert "no-new-privileges:true" in service["security_opt"], name
            for port in service.get("ports", ()):
                assert port.startswith("127.0.0.1:"), (name, port)

    def test_the_stop_grace_period_is_longer_than_draining(self):
        fields = Settings.model_fields
        drain = fields["drain_delay"].default + fields["drain_limit"].default
        assert float(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s")) > drain

    def test_prometheus_resolves_names_of_compose_services(self):
        (scrape,) = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
        (names,) = (config["names"] for config in scrape["dns_sd_configs"])
        assert set(names) <= COMPOSE["services"].keys()
        assert COMPOSE["services"]["server-gpu"]["networks"]["default"]["aliases"] == names

    def test_grafana_provisioning_matches_the_mounts(self):
        volumes = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
        provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/pid.yaml").read_text())
        assert f"{provider['providers'][0]['options']['path']}/pid.json" in volumes
        source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())
        assert source["datasources"][0]["url"] == "http://prometheus:9090"
        assert "prometheus" in COMPOSE["services"]

    def test_the_demo_load_uses_sizes_of_the_bundled_decoder(self):
        sizes = DESCRIPTION.sizes
        assert {kind.size for kind in load_scenario(ROOT / "docker/demo-load.toml").mix} <= set(sizes)


@pytest.mark.operate
def test_hadolint_accepts_the_dockerfile():
    run("hadolint", "Dockerfile")


@pytest.fixture(scope="module")
def image(podman: Podman) -> dict[str, Any]:
    return podman.inspect("image", CPU_IMAGE)


@pytest.mark.operate
class TestImage:
    def test_the_image_has_the_user_signal_entrypoint_and_health_check_that_orchestrators_use(
        self, image: dict[str, Any]
    ):
        config = image["Config"]
        assert config["User"] == "10001:10001"
        assert config["StopSignal"] == "SIGTERM"
        assert config["Entrypoint"] == ["python", "-m", "server"]
        assert image["Healthcheck"]["Test"] == ["CMD", "python", "healthcheck.py"]
        assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"

    def test_the_image_is_not_larger_than_documented(self, image: dict[str, Any]):
        assert image["Size"] <= MAX_BYTES

    def test_the_only_weights_inside_are_those_of_the_bundled_decoder(self, podman: Podman):
        suffixes = ("safetensors", "pth", "pt", "engine", "onnx", "plan")
        names = " -o ".join(f"-name '*.{suffix}'" for suffix in suffixes)
        command = f"find / -xdev -type f -size +64k \\( {names} \\) 2>/dev/null; ls /bundles"
        found = podman("run", "--rm", "--entrypoint", "sh", CPU_IMAGE, "-c", command)
        assert found.split() == ["/app/engines/bundled/decoder.safetensors"]

    def test_modules_that_the_server_imports_are_compiled(self, podman: Podman):
        command = "import server.scheduling.scheduler as module; print(module.__cached__)"
        path = podman("run", "--rm", "--entrypoint", "python", CPU_IMAGE, "-c", command)
        podman("run", "--rm", "--entrypoint", "ls", CPU_IMAGE, path)

    def test_its_software_bill_of_materials_lists_the_pinned_packages(self, podman: Podman, tmp_path: Path):
        from tests.operations.sbom import make_sbom, packages  # its packages are installed by make test-operations

        root = podman("image", "mount", CPU_IMAGE)
        try:
            sbom = make_sbom(f"dir:{root}", tmp_path / "sbom.json")
        finally:
            podman("image", "umount", CPU_IMAGE)
        assert "ca-certificates" in packages(sbom, "deb")
        installed = packages(sbom, "pypi")
        pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
        for name in ("torch", "fastapi", "numba", "pillow"):
            assert installed[name].split("+")[0] == {key.lower(): value for key, value in pins.items()}[name]

    def test_the_gpu_image_contains_the_compiler_that_triton_needs(self, podman: Podman):
        image = "localhost/pid-decode-server:server-gpu"
        podman("run", "--rm", "--entrypoint", "gcc", image, "--version")
        config = podman.inspect("image", image)["Config"]
        assert config["User"] == "10001:10001"
        assert "NVIDIA_VISIBLE_DEVICES=all" in config["Env"]
