"""PromQL of the dashboard's panels, for the servers and decoders that are selected at its top."""

from __future__ import annotations

SERVERS = '{job=~"$job", instance=~"$instance"}'
DECODERS = '{job=~"$job", instance=~"$instance", decoder=~"$decoder"}'  # for metrics with this label
JOBS = '{job=~"$job", decoder=~"$decoder"}'  # for series that are recorded by job and decoder


def where(selected: str, condition: str) -> str:
    """Return the label matchers `selected` with another one."""
    return selected.replace("}", f", {condition}}}")


def rate(metric: str, *labels: str, of: str = SERVERS) -> str:
    """Return the rate of a counter, added up by `labels`, over the series that the matchers `of` select."""
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({metric}{of}[$__rate_interval]))"


def quantile(q: float, metric: str, *labels: str, of: str = SERVERS) -> str:
    """Return a quantile of a histogram, by `labels`, over the series that the matchers `of` select."""
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', 'le', *labels, of=of)})"


def mean(metric: str, *labels: str, of: str = SERVERS) -> str:
    """Return the mean of a histogram, by `labels`, over the series that the matchers `of` select."""
    return f"{rate(f'{metric}_sum', *labels, of=of)} / {rate(f'{metric}_count', *labels, of=of)}"
