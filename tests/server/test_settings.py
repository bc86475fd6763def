"""Settings: their sources, their presentation in --help, and the messages for mistakes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from engines.errors import ConfigError
from engines.size import Size
from server.command_line import read_settings, warn_about_unknown_variables
from server.settings import Settings

FORMER_NAMES = {
    "slots": "device_slots",
    "fail_grace": "failure_exit_delay",
    "key_in_flight": "max_in_flight_per_key",
    "body_seconds": "body_timeout",
    "delivery_seconds": "response_timeout",
    "header_seconds": "header_timeout",
    "keep_alive_seconds": "keep_alive_timeout",
    "max_header_fields": "max_headers",
    "max_header": "max_header_bytes",
    "max_body": "max_body_bytes",
}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read(*flags: str, **environment: str) -> Settings:
    return read_settings(["--bundle", "bundles/flux", *flags], environment)


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    """Exit status and output of a command line that ends the process."""
    with pytest.raises(SystemExit) as exit_:
        read_settings(flags, {})
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out + err


def test_idle_connections_are_kept_longer_than_by_load_balancers():
    assert read().keep_alive_timeout > 60


class TestBundles:
    def test_a_single_bundle_needs_no_name(self):
        assert read().bundle == {"": Path("bundles/flux")}

    def test_a_path_with_a_comma_or_an_equals_sign_is_a_single_bundle(self):
        for path in ("bundles/a,b", "./a=b", "/bundles/a=b"):
            assert read_settings(["--bundle", path], {}).bundle == {"": Path(path)}

    @pytest.mark.parametrize(
        ("flags", "variables"),
        [
            (["--bundle", "flux=bundles/flux", "--bundle", "sdxl=bundles/a,b"], {}),
            (["--bundle=flux=bundles/flux,sdxl=bundles/a,b"], {}),
            ([], {"PID_BUNDLE": "flux=bundles/flux, sdxl=bundles/a,b"}),
        ],
    )
    def test_several_bundles_have_names(self, flags: list[str], variables: dict[str, str]):
        bundles = read_settings(flags, variables).bundle
        assert bundles == {"flux": Path("bundles/flux"), "sdxl": Path("bundles/a,b")}
        assert list(bundles) == ["flux", "sdxl"]  # the first one is the one of the examples in /docs

    @pytest.mark.parametrize("second", ["bundles/sdxl", "=bundles/sdxl", f"{'x' * 65}=bundles"])
    def test_several_bundles_without_valid_names_are_rejected(self, second: str):
        with pytest.raises(ConfigError, match=r"--bundle .* should name each of several bundles"):
            read_settings(["--bundle", "flux=bundles/flux", "--bundle", second], {})

    def test_a_name_without_a_directory_is_rejected(self):
        with pytest.raises(ConfigError, match="should have a directory after the name"):
            read_settings(["--bundle", "flux="], {})

    def test_a_name_that_occurs_twice_is_rejected(self):
        with pytest.raises(ConfigError, match="flux occurs twice"):
            read_settings(["--bundle", "flux=a", "--bundle", "flux=b"], {})


class TestSources:
    def test_flags_override_variables_and_variables_override_defaults(self):
        assert read().queue_images == 64
        assert read(PID_QUEUE_IMAGES="5").queue_images == 5
        assert read("--queue-images", "6", PID_QUEUE_IMAGES="5").queue_images == 6

    def test_the_last_of_repeated_flags_counts(self):
        assert read("--port=1", "--port", "2").port == 2

    def test_variable_names_ignore_case(self):
        settings = read_settings([], {"pid_bundle": "bundles/flux", "Pid_Port": "0"})
        assert (settings.bundle, settings.port) == ({"": Path("bundles/flux")}, 0)

    @pytest.mark.parametrize(
        ("flags", "variable", "value"),
        [
            ([], None, None),
            (["--compile"], None, True),
            (["--no-compile"], None, False),
            ([], "1", True),
            ([], "false", False),
            (["--no-compile"], "true", False),
        ],
    )
    def test_booleans_have_two_flags_and_a_variable(self, flags: list[str], variable: str | None, value: bool | None):
        assert read(*flags, **({} if variable is None else {"PID_COMPILE": variable})).compile is value

    @pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
    def test_a_former_name_is_accepted_as_flag_and_variable(self, former: str, name: str):
        assert getattr(read(flag(former), "2000"), name) == 2000
        assert getattr(read(**{f"PID_{former.upper()}": "2000"}), name) == 2000
        both = {f"PID_{former.upper()}": "2000", f"PID_{name.upper()}": "3000"}
        assert getattr(read(**both), name) == 3000

    @pytest.mark.parametrize("name", ["api_keys", "traces", "max_batch", "cpu_threads", "device_slots", "slots"])
    def test_null_unsets_an_optional_setting(self, name: str):
        settings = read(flag(name), "null", **{f"PID_{name.upper()}": "2"})
        assert getattr(settings, FORMER_NAMES.get(name, name)) is None

    def test_sizes_are_separated_by_commas(self):
        assert read("--sizes", "2048x1024, 512").sizes == (Size(2048, 1024), Size(512, 512))
        assert read(PID_SIZES="64x96").sizes == (Size(64, 96),)
        assert read().sizes is None
        with pytest.raises(ConfigError, match=r"--sizes \(or PID_SIZES\) 'x9' is not a size"):
            read("--sizes", "64x96,x9")
        with pytest.raises(ConfigError, match=r"--sizes \(or PID_SIZES\) .*at most 64 items"):
            read("--sizes", ",".join(["64x96"] * 65))

    @pytest.mark.parametrize("empty", ["", " "])
    def test_an_empty_variable_is_not_set(self, empty: str):
        settings = read(PID_PORT=empty, pid_compile=empty, PID_API_KEYS=empty, PID_FAULTS=empty)
        assert settings == read()
        assert read(PID_MAX_BODY_BYTES=empty, PID_MAX_BODY="2000").max_body_bytes == 2000
        with pytest.raises(ConfigError, match=r"--bundle \(or PID_BUNDLE\) is required"):
            read_settings([], {"PID_BUNDLE": empty})

    def test_settings_are_frozen_and_have_no_other_fields(self):
        with pytest.raises(ValidationError, match="frozen"):
            read().port = 1  # type: ignore[misc]
        with pytest.raises(ValidationError, match="queue"):
            Settings(bundle=Path(), queue=3)  # type: ignore[call-arg]


class TestHelp:
    def test_help_shows_every_setting_once_and_no_former_name(self, capsys: pytest.CaptureFixture[str]):
        status, text = printed(capsys, "--help")
        assert status == 0
        for name in Settings.model_fields:
            assert text.count(f"\n  {flag(name)} ") + text.count(f"\n  {flag(name)},") == 1, name
        shown = {word.strip(",") for word in text.split()}
        assert not shown & {flag(former) for former in FORMER_NAMES}

    @pytest.mark.parametrize(
        "part",
        [
            "\nlimits:\n",
            "\nscheduling:\n",
            "--body-timeout SECONDS",
            "--max-body-bytes BYTES",
            "(default: 256 MiB)",
            "(default: 16 KiB)",
            "(default: 0.9)",
            "(required)",
            "(default: no authentication)",
            "PID_QUEUE_IMAGES",
        ],
    )
    def test_help_is_grouped_and_shows_units_and_defaults(self, capsys: pytest.CaptureFixture[str], part: str):
        assert part in printed(capsys, "--help")[1]

    def test_the_version_is_printed(self, capsys: pytest.CaptureFixture[str]):
        status, text = printed(capsys, "--version")
        assert status == 0
        assert text.startswith("pid-decode-server ")


class TestMistakes:
    @pytest.mark.parametrize(
        ("flags", "advice"),
        [
            (["--quue-images", "3"], "Did you mean --queue-images?"),
            (["--max_batch=2"], "Did you mean --max-batch?"),
            (["--zzz"], "unrecognized arguments: --zzz. See"),
            (["--max-b", "2"], "unrecognized arguments: --max-b 2."),  # flags cannot be abbreviated
            (["bundle"], "unrecognized arguments: bundle."),
            (["--port"], "argument --port: expected one argument"),
        ],
    )
    def test_a_wrong_flag_is_reported_in_one_line(
        self, capsys: pytest.CaptureFixture[str], flags: list[str], advice: str
    ):
        status, text = printed(capsys, *flags)
        assert status == 2
        assert advice in text
        assert text.count("\n") == 1
        assert text.startswith("python -m server: ")
        assert "--help" in text

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--port", "70000"], "--port (or PID_PORT) should be less than or equal to 65535, not '70000'."),
            (["--port", "http"], "--port (or PID_PORT) should be a valid integer, not 'http'."),
            (["--slots", "0"], "--device-slots (or PID_DEVICE_SLOTS) should be greater than or equal to 1, not '0'."),
            (["--log-level", "all"], "should be 'debug', 'info', 'warning' or 'error', not 'all'."),
        ],
    )
    def test_a_value_out_of_range_names_the_flag_and_the_variable(self, flags: list[str], message: str):
        with pytest.raises(ConfigError) as error:
            read(*flags)
        assert str(error.value).endswith(message)

    def test_a_bundle_is_required(self):
        with pytest.raises(ConfigError, match=r"--bundle \(or PID_BUNDLE\) is required"):
            read_settings([], {})

    def test_an_unknown_variable_is_logged_with_the_closest_known_name(self, caplog: pytest.LogCaptureFixture):
        environment = {"PID_QUEUE_IMAGE": "3", "PID_HOME": "/pid", "PID_PORT": "1", "PID_SLOTS": "2", "PATH": "/bin"}
        with caplog.at_level(logging.WARNING):
            warn_about_unknown_variables(environment)
        (message,) = caplog.messages
        assert message.endswith(": PID_HOME, PID_QUEUE_IMAGE (did you mean PID_QUEUE_IMAGES?)")

    def test_known_variables_are_not_logged(self, caplog: pytest.LogCaptureFixture):
        warn_about_unknown_variables({"PID_PORT": "1", "pid_host": "::1", "PID_SLOTS": "2", "PIDFILE": "/run/pid"})
        assert not caplog.messages
