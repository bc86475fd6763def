"""Metrics of GPUs: each value comes from the right device, and one that is not available leaves out only its series."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pynvml
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import gauges
from server.gauges import add_memory
from server.gpus import REOPEN_SECONDS, Gpu, Memory
from server.main import gpus_of
from server.service import THREADS
from tests.server.conftest import Serve, simulated
from tests.server.nvml import CUDA, UUID, NvmlDevice, StandInNvml, stand_in_gpu
from tests.waiting import until

NVML = Memory(used=10, free=90)  # of the stand-in
MIG_MEMORY = (1, 4)
OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


def whole_gpu(memory: tuple[int, int] | int = (10, 90), utilisation: float | int = 0.5) -> StandInNvml:
    return StandInNvml({f"GPU-{UUID}": NvmlDevice(memory, utilisation, divided=pynvml.NVML_ERROR_NOT_SUPPORTED)})


# Case of docs/operations.md: NVML, then the memory and utilisation in /metrics.
CASES: dict[str, tuple[StandInNvml, Memory, float | None]] = {
    "NVML works": (whole_gpu(), NVML, 0.5),
    "MIG instance": (
        StandInNvml({f"MIG-{UUID}": NvmlDevice(MIG_MEMORY, pynvml.NVML_ERROR_NOT_SUPPORTED)}),
        Memory(*MIG_MEMORY),
        None,
    ),
    "MIG instance whose UUID CUDA does not return": (
        StandInNvml({f"GPU-{UUID}": NvmlDevice(divided=True)}),
        CUDA,
        None,
    ),
    "unified memory (GB10)": (whole_gpu(memory=pynvml.NVML_ERROR_NOT_SUPPORTED), CUDA, 0.5),
    "unified memory, reported as 0 bytes": (whole_gpu(memory=(0, 0)), CUDA, 0.5),
    "vGPU without utilisation": (whole_gpu(utilisation=pynvml.NVML_ERROR_NOT_SUPPORTED), NVML, None),
    "function missing in an old driver": (whole_gpu(utilisation=pynvml.NVML_ERROR_FUNCTION_NOT_FOUND), NVML, None),
    "no permission": (
        whole_gpu(pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NO_PERMISSION),
        CUDA,
        None,
    ),
    "GPU lost, as long as CUDA responds": (
        whole_gpu(pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_GPU_IS_LOST),
        CUDA,
        None,
    ),
    "UUID unknown": (StandInNvml({}), CUDA, None),
    "lookup not permitted": (StandInNvml({f"GPU-{UUID}": pynvml.NVML_ERROR_NO_PERMISSION}), CUDA, None),
    "NVML library missing": (StandInNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), CUDA, None),
    "driver not loaded": (StandInNvml(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED), CUDA, None),
    "library and driver of different versions": (
        StandInNvml(init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
        CUDA,
        None,
    ),
}


Series = dict[str, float]
Peak = Callable[[], int | None]


class Scraper:
    """The metrics of GPUs in a registry, as /metrics writes them."""

    def __init__(self, gpus: Mapping[str, Gpu], peak: Peak = lambda: None) -> None:
        self._registry = CollectorRegistry()
        add_memory(self._registry, {name: (gpu, peak) for name, gpu in gpus.items()})

    def scrape(self) -> tuple[Series, Series]:
        """Return the memory by kind, and the utilisation by device."""
        text = generate_latest(self._registry).decode()
        memory, utilisation = text_string_to_metric_families(text)  # both also without any series
        return (
            {sample.labels["kind"]: sample.value for sample in memory.samples},
            {sample.labels["device"]: sample.value for sample in utilisation.samples},
        )


@pytest.mark.parametrize("case", CASES)
def test_what_nvml_does_not_report_is_left_out_of_the_metrics(case: str):
    nvml, memory, utilisation = CASES[case]
    scraper = Scraper({"cuda:0": stand_in_gpu(nvml)})
    for _ in range(2):
        expected = {} if utilisation is None else {"cuda:0": utilisation}
        assert scraper.scrape() == ({"used": memory.used, "free": memory.free}, expected)


def test_the_documentation_lists_these_cases():
    text = OPERATIONS.read_text()
    table = text[text.index("| case | memory `used`, `free` | utilisation |") :].split("\n\n")[0]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[2:]]
    sources = {NVML: "NVML", Memory(*MIG_MEMORY): "NVML", CUDA: "CUDA"}
    expected = [(case, sources[memory], "–" if used is None else "NVML") for case, (_, memory, used) in CASES.items()]
    assert [row for row in rows if row[0] in CASES] == expected


class TestFailures:
    def test_each_kind_is_logged_once(self, caplog: pytest.LogCaptureFixture):
        gpu = stand_in_gpu(whole_gpu(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION))
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                gpu.memory()
                gpu.utilisation()
        assert [message.partition(";")[0] for message in caplog.messages] == [
            "cuda:0: NVML does not report the memory: Not Supported",
            "cuda:0: NVML does not report the utilisation: Insufficient Permissions",
        ]

    def test_without_cuda_there_is_no_memory_either(self):
        def lost(device: str) -> Memory:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nMore lines.", 700)

        gpu = Gpu("cuda:0", lambda: StandInNvml({}), lambda device: UUID, lost)
        assert gpu.memory() is None

    def test_a_uuid_that_cuda_does_not_report_leaves_the_memory(self):
        def fail(device: str) -> str:
            raise RuntimeError("CUDA error")

        gpu = Gpu("cuda:0", StandInNvml, fail, lambda device: CUDA)
        assert (gpu.memory(), gpu.utilisation()) == (CUDA, None)

    @pytest.mark.parametrize("error", [ImportError("no module"), SyntaxError("damaged"), OSError("I/O error")])
    def test_a_binding_that_cannot_be_imported_leaves_the_memory(self, error: Exception):
        def fail() -> StandInNvml:
            raise error

        gpu = Gpu("cuda:0", fail, lambda device: UUID, lambda device: CUDA)
        assert (gpu.memory(), gpu.utilisation()) == (CUDA, None)

    def test_a_missing_binding_leaves_the_memory(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        gpu = Gpu("cuda:0", uuid=lambda device: UUID, cuda=lambda device: CUDA)
        assert (gpu.memory(), gpu.utilisation()) == (CUDA, None)
        assert "pynvml" in caplog.messages[0]

    @pytest.mark.parametrize(
        "error",
        [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED],
    )
    def test_after_a_reset_or_a_reload_the_gpu_is_opened_again(self, error: int):
        now = 0.0
        device = NvmlDevice()
        nvml = StandInNvml({f"GPU-{UUID}": device})
        gpu = Gpu("cuda:0", lambda: nvml, lambda name: UUID, lambda name: CUDA, lambda: now)
        assert gpu.memory() == NVML
        device.memory = error
        assert gpu.memory() == CUDA
        device.memory = (10, 90)
        assert gpu.memory() == CUDA  # opening may take long, so not at every scrape
        assert len(nvml.lookups) == 1
        now = REOPEN_SECONDS
        assert gpu.memory() == NVML
        assert nvml.open == 1

    def test_an_error_of_one_query_does_not_close_the_gpu(self):
        nvml = whole_gpu(utilisation=pynvml.NVML_ERROR_UNKNOWN)
        gpu = stand_in_gpu(nvml)
        for _ in range(3):
            assert (gpu.memory(), gpu.utilisation()) == (NVML, None)
        assert len(nvml.lookups) == 1

    def test_a_failed_lookup_leaves_nvml_closed(self):
        nvml = StandInNvml({})
        assert stand_in_gpu(nvml).utilisation() is None
        assert nvml.open == 0


class TestDevices:
    def test_devices_are_found_by_their_uuid_in_any_order(self):
        uuids = {"cuda:0": "bbbb", "cuda:1": "aaaa"}  # CUDA_VISIBLE_DEVICES=1,0
        nvml = StandInNvml(
            {f"GPU-{name}": NvmlDevice((1, 9), 0.1 * i) for i, name in enumerate(("aaaa", "bbbb", "cccc"))}
        )
        _, utilisation = Scraper({name: stand_in_gpu(nvml, name, uuid) for name, uuid in uuids.items()}).scrape()
        assert utilisation == {"cuda:0": 0.1, "cuda:1": 0.0}

    def test_only_cuda_devices_are_queried(self):
        assert set(gpus_of(["cpu", "cuda:1", "simulated:0"])) == {"cuda:1"}

    def test_without_gpus_the_memory_is_that_of_the_process(self):
        memory, utilisation = Scraper({}).scrape()
        assert set(memory) == {"used", "free"}
        assert utilisation == {}


class TestPeak:
    def test_it_is_reported_per_gpu(self):
        memory, _ = Scraper({"cuda:0": stand_in_gpu(whole_gpu())}, peak=lambda: 18).scrape()
        assert memory == {"used": 10, "free": 90, "peak": 18}

    def test_if_it_fails_the_other_series_remain(self):
        def fail() -> int:
            raise RuntimeError("CUDA error: unknown error")

        found = Scraper({"cuda:0": stand_in_gpu(whole_gpu())}, fail).scrape()
        assert found == ({"used": 10, "free": 90}, {"cuda:0": 0.5})


def test_a_driver_that_hangs_leaves_out_one_gpu_and_delays_no_request(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gauges, "READ_SECONDS", 0.1)
    released = threading.Event()

    def hang(device: str) -> Memory:
        released.wait()
        return CUDA

    gpus = {
        "cuda:0": Gpu("cuda:0", lambda: StandInNvml({}), lambda device: UUID, hang),
        "cuda:1": stand_in_gpu(whole_gpu(), "cuda:1"),
    }
    try:
        with serve({name: simulated() for name in gpus}, gpus=gpus) as running:
            for _ in range(2 * THREADS):  # more than there are threads for requests
                metrics = running.client.get("/metrics")
                assert metrics.status_code == 200
                assert 'pid_gpu_utilisation_ratio{device="cuda:1"} 0.5' in metrics.text
                assert 'pid_memory_bytes{device="cuda:0"' not in metrics.text
            assert running.decode().status_code == 200
            released.set()
            until(lambda: 'pid_memory_bytes{device="cuda:0",kind="used"} 7.0' in running.client.get("/metrics").text)
    finally:
        released.set()
