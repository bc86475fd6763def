"""Configuration of a Prometheus on this machine, for tests and docs/dashboard.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

SHIPPED = Path(__file__).with_name("prometheus.yml")


def write_configuration(path: Path, servers: Mapping[str, str], seconds: int) -> None:
    """Write the shipped configuration with fixed servers and short intervals.

    Args:
        path: File to write.
        servers: Addresses, host:port, by the instance names that panels show.
        seconds: Interval of scrapes and of the evaluation of rules.
    """
    config = yaml.safe_load(SHIPPED.read_text())
    interval = f"{seconds}s"
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(SHIPPED.parent / name) for name in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [
        {"targets": [address], "labels": {"instance": instance}} for instance, address in servers.items()
    ]
    path.write_text(yaml.safe_dump(config))
