"""The wrapper around the TensorRT packages, and the fake that replaces them in other tests."""

import logging
import sys
from types import ModuleType

import pytest

from engines.errors import BundleError, ConfigError
from engines.pid import PidDecoder, fold
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.trt import TensorRT, import_package
from tests.engines.runtime.fake_tensorrt import (
    VERSION,
    DataType,
    FakeContext,
    FakeEngine,
    FakeModule,
    FakeRuntime,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    fake_tensorrt,
)
from tests.tiny import TINY

OWN = {"compile"}  # names that only the fake has


@pytest.fixture
def tensorrt(caplog: pytest.LogCaptureFixture) -> TensorRT:
    caplog.set_level(logging.DEBUG, logger="engines.runtime.trt")  # build_engines.py may have silenced it
    return fake_tensorrt(fold(PidDecoder(TINY), MODEL_TIMESTEPS))


class TestPackage:
    @pytest.fixture(autouse=True)
    def _clear_cache(self):
        import_package.cache_clear()
        yield
        import_package.cache_clear()

    def test_the_message_for_a_missing_package_has_the_command_to_install_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(ConfigError, match="pip install tensorrt-rtx"):
            import_package("tensorrt-rtx")

    @pytest.mark.parametrize("failure", ["import no_such_bindings", "raise OSError('libnvinfer.so.11 not found')"])
    def test_the_message_for_a_broken_package_has_the_reason(self, monkeypatch, tmp_path, failure: str):
        (tmp_path / "tensorrt.py").write_text(failure)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        with pytest.raises(ConfigError, match=r"cannot be imported: .*(no_such_bindings|libnvinfer)"):
            import_package("tensorrt")

    def test_the_version_is_that_of_the_module(self, monkeypatch):
        module = ModuleType("tensorrt")
        module.__dict__.update(vars(FakeModule), __version__="11.4.0.1")
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        tensorrt = import_package("tensorrt")
        assert (tensorrt.version, tensorrt.compiles_on_device) == ("11.4.0.1", False)

    def test_the_log_is_forwarded_and_its_last_error_is_part_of_the_message(self, tensorrt, caplog):
        with pytest.raises(BundleError, match=r"broken.engine: Magic tag") as caught:
            tensorrt.load("broken.engine", bytearray(b"no plan"))
        assert f"tensorrt-rtx {VERSION}" in str(caught.value)
        assert [(record.levelno, record.message) for record in caplog.records] == [
            (logging.ERROR, "Magic tag does not match.")
        ]


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (FakeModule, None),
        (FakeRuntime, "Runtime"),
        (FakeEngine, "ICudaEngine EngineInspector"),
        (FakeContext, "IExecutionContext"),
        (FakeRuntimeConfig, "IRuntimeConfig"),
        (FakeRuntimeCache, "IRuntimeCache"),
    ],
)
def test_the_fake_has_only_names_of_the_real_tensorrt(fake: type, real: str | None):
    module = import_package("tensorrt-rtx").module
    known = {
        name for kind in ([module] if real is None else map(module.__dict__.get, real.split())) for name in dir(kind)
    }
    used = {name for name, value in vars(fake).items() if not name.startswith("_") and name not in OWN}
    assert used
    assert used <= known
    for enum in ("TensorIOMode", "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        assert {member.name for member in getattr(FakeModule, enum)} <= set(getattr(module, enum).__members__)
    assert {member.name for member in DataType} <= set(module.DataType.__members__)
