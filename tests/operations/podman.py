"""Real containers: podman with separate storage, and images that docker/build_with_buildah.sh built."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.programs import ROOT, program
from tests.waiting import responds, until

CPU_IMAGE = "localhost/pid-decode-server:cpu"
PORT = 8000
TMP = "/tmp"  # noqa: S108  inside containers
# As Kubernetes runs it: docker/helm sets the same restrictions.
CONFINED = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", f"{TMP}:rw,mode=1777"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "1g", "--memory-swap", "1g"),
)
# The limit of open files is the default of containers.
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
_STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/store"
runroot = "{folder}/run"
"""
_SECONDS = 300.0


class Podman:
    """Commands of podman for the storage in one folder."""

    def __init__(self, folder: Path) -> None:
        program("podman")
        self.folder = folder
        self.environment = dict(os.environ)
        for name, text in (("CONTAINERS_CONF", _CONFIGURATION), ("CONTAINERS_STORAGE_CONF", _STORAGE)):
            path = folder / f"{name.lower()}.conf"
            path.write_text(text.format(folder=folder))
            self.environment[name] = str(path)

    def __call__(self, *arguments: object) -> str:
        """Return the stdout of `podman ARGUMENTS`; fail the test if the exit status is not 0."""
        done = self.attempt(*arguments)
        assert done.returncode == 0, f"podman {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def attempt(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run `podman ARGUMENTS`."""
        command = ["podman", *map(str, arguments)]
        return subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS)

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        """Return what podman knows of an object, such as a container or an image."""
        (description,) = json.loads(self(kind, "inspect", name))
        return dict(description)

    @contextmanager
    def network(self, name: str) -> Iterator[str]:
        """Create a network in which containers find each other by name."""
        self("network", "create", name)
        try:
            yield name
        finally:
            self("network", "rm", "--force", "--time", 0, name)

    @contextmanager
    def container(
        self, *flags: object, image: str = CPU_IMAGE, command: tuple[object, ...] = ()
    ) -> Iterator[Container]:
        """Run a container in the background; remove it when the block ends."""
        container = Container(self, self("run", "--detach", "--no-healthcheck", *flags, image, *command))
        try:
            yield container
        except BaseException:
            print(container.logs())
            raise
        finally:
            self("rm", "--force", "--time", 0, container.name)

    def remove_everything(self) -> None:
        """Remove all containers and networks, and unmount the storage."""
        self("pod", "rm", "--all", "--force")
        self("rm", "--all", "--force", "--time", 0)
        self("network", "prune", "--force")
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            mounted = line.split()[1]
            if mounted.startswith(f"{self.folder}/"):
                subprocess.run([program("umount"), mounted], check=True)


class Container:
    """A container that runs, or has run."""

    def __init__(self, podman: Podman, name: str) -> None:
        self._podman, self.name = podman, name

    @property
    def state(self) -> dict[str, Any]:
        """The `State` that podman reports."""
        return dict(self._podman.inspect("container", self.name)["State"])

    @property
    def address(self) -> str:
        """IP address, in the only network of the container."""
        networks: Mapping[str, Any] = self._podman.inspect("container", self.name)["NetworkSettings"]["Networks"]
        (network,) = networks.values()
        return str(network["IPAddress"])

    @property
    def url(self) -> str:
        """URL of the server in the container."""
        return f"http://{self.address}:{PORT}"

    def logs(self) -> str:
        """Return stdout and stderr."""
        done = self._podman.attempt("logs", self.name)
        return done.stdout + done.stderr

    def run(self, *command: object) -> str:
        """Run a command in the container and return its stdout."""
        return self._podman("exec", self.name, *command)

    def wait_until_ready(self) -> None:
        """Wait until the server in the container accepts requests; fail the test if the container ends."""
        url = self.url

        def ready() -> bool:
            running = self.state["Running"]
            assert running, self.logs()
            return responds(f"{url}/health/ready")

        until(ready, f"{self.name} to be ready", 180)

    def stop(self) -> int:
        """Send SIGTERM, wait for the end and return the exit status."""
        self._podman("stop", "--time", 75, self.name)
        return int(self.state["ExitCode"])

    def decode(self, body: bytes, **options: object) -> httpx.Response:
        """Post a safetensors body to /decode."""
        headers = {"Content-Type": "application/x-safetensors"}
        return httpx.post(f"{self.url}/decode", content=body, headers=headers, params=dict(options), timeout=60)
