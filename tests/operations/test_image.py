"""The container images, built by buildah on Debian's Python and run without root on a read-only file system."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engines.bundled.decoder import DESCRIPTION
from loadtest.processes import free_port
from loadtest.scenario import load_scenario
from server.settings import Settings
from tests.operations.conftest import responds
from tests.programs import ROOT, program, run, running
from tests.waiting import until

COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
TMP = "/tmp"  # noqa: S108  inside the container


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


class Image:
    """An image's root file system and configuration."""

    def __init__(self, folder: Path, target: str) -> None:
        self.root = (folder / target).resolve()
        self.config: dict[str, Any] = json.loads((folder / f"{target}.json").read_text())["Docker"]["config"]

    def command(self, arguments: list[str], mounts: dict[str, Path], **environment: object) -> list[str]:
        """Return the command that runs `arguments` as the image's user, on a read-only root with an empty /tmp."""
        user, root = self.config["User"], shlex.quote(str(self.root))
        variables = [*self.config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        binds = "".join(f"mount --bind {shlex.quote(str(path))} {root}{at}\n" for at, path in mounts.items())
        inside = f"cd {self.config['WorkingDir']} && exec {shlex.join(arguments)}"
        inner = ["chroot", f"--userspec={user}", str(self.root), "env", "-i", *variables, "sh", "-c", inside]
        script = f"""
            mount --bind {root} {root}
            mount -o remount,bind,ro {root}
            mount -t proc proc {root}/proc
            mount --bind /dev {root}/dev
            mount -t tmpfs tmpfs {root}{TMP}
            {binds}
            exec {shlex.join(inner)}
        """
        return ["unshare", "--mount", "--propagation", "private", "bash", "-ec", script]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory in which docker/build_with_buildah.sh built the images. Set PID_IMAGES to reuse an earlier build."""
    if "PID_IMAGES" in os.environ:
        yield Path(os.environ["PID_IMAGES"])
        return
    for name in ("buildah", "debootstrap", "unshare"):
        program(name)
    folder = tmp_path_factory.mktemp("images")
    built = subprocess.run(
        [ROOT / "docker/build_with_buildah.sh", folder], capture_output=True, text=True, timeout=1200
    )
    try:
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
        yield folder
    finally:
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for path in sorted((path for path in mounted if path.startswith(str(folder))), reverse=True):
            run("umount", path)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image(images: Path) -> Image:
    return Image(images, "cpu")


@pytest.fixture(scope="session")
def mounts(image: Image, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Volumes as in compose, with a bundle built by the image itself as in the service `bundle`."""
    volumes = {"/bundles": tmp_path_factory.mktemp("bundles"), "/cache": tmp_path_factory.mktemp("cache")}
    for path in volumes.values():
        os.chown(path, 10001, 10001)
    service = COMPOSE["services"]["bundle"]
    built = subprocess.run(
        image.command([*service["entrypoint"], *service["command"]], volumes), capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return volumes


@pytest.mark.operate
class TestImage:
    def test_the_image_has_the_user_signal_entrypoint_and_health_check_that_orchestrators_use(self, image: Image):
        assert image.config["User"] == "10001:10001"
        assert image.config["StopSignal"] == "SIGTERM"
        assert image.config["Entrypoint"] == ["python", "-m", "server"]
        assert image.config["Healthcheck"]["Test"] == ["CMD", "python", "healthcheck.py"]
        assert image.config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"

    def test_the_only_weights_inside_are_those_of_the_bundled_decoder(self, image: Image):
        found = [
            path.relative_to(image.root / "app")
            for suffix in ("safetensors", "pth", "pt", "engine", "onnx", "plan")
            for path in (image.root / "app").rglob(f"*.{suffix}")
        ]
        assert found == [Path("engines/bundled/decoder.safetensors")]
        assert not list((image.root / "bundles").iterdir())

    def test_the_image_serves_without_root_on_a_read_only_file_system(
        self, image: Image, mounts: dict[str, Path], tmp_path: Path
    ):
        port = free_port()
        environment = {"PID_HOST": "127.0.0.1", "PID_PORT": port, "PID_BUNDLE": "/bundles/demo", "PID_DRAIN_DELAY": 0}
        probe = image.command(["python", "healthcheck.py"], mounts, **environment)
        assert subprocess.run(probe, capture_output=True).returncode == 1  # no server yet
        entrypoint = image.config["Entrypoint"]
        with running(image.command(entrypoint, mounts, **environment), tmp_path / "log") as server:
            until(lambda: responds(f"http://127.0.0.1:{port}/health/ready"), "the image to be ready", 180)
            status = Path(f"/proc/{server.pid}/status").read_text()
            assert "Uid:\t10001\t10001" in status
            assert subprocess.run(probe, capture_output=True).returncode == 0
            (decoder,) = httpx.get(f"http://127.0.0.1:{port}/info").json()["decoders"]
            assert decoder["model"] == "dct-demo"
            server.terminate()
            assert server.wait(30) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert list(mounts["/cache"].glob("uid-10001/*/numba/**/*.nbi")), "compiled kernels must be cached"

    def test_only_the_volumes_are_writable(self, image: Image, mounts: dict[str, Path]):
        for place, status in (("/app", 1), ("/opt/venv", 1), ("/cache", 0), (TMP, 0)):
            touched = subprocess.run(image.command(["touch", f"{place}/x"], mounts), capture_output=True)
            assert touched.returncode == status, place

    def test_the_gpu_image_contains_the_compiler_that_triton_needs(self, images: Path):
        gpu = Image(images, "server-gpu")
        assert (gpu.root / "usr/bin/gcc").exists()
        assert gpu.config["User"] == "10001:10001"
        assert "NVIDIA_VISIBLE_DEVICES=all" in gpu.config["Env"]
