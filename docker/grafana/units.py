"""How values are written: the Grafana units that the dashboard uses."""

from __future__ import annotations

_SECONDS = ((1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
_BYTES = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"), (2.0**40, "TiB"))
_SCALES = {
    "none": ((1.0, ""),),
    "percentunit": ((0.01, "%"),),
    "s": _SECONDS,
    "bytes": _BYTES,
    "binBps": tuple((size, f"{symbol}/s") for size, symbol in _BYTES),
}


def scale(unit: str, largest: float) -> tuple[float, str]:
    """Choose how values up to `largest` are written: as multiples of a size, followed by a symbol.

    Args:
        unit: A Grafana unit id: one of those above, or "suffix:" and a symbol.
        largest: Largest value, in the unit of the query.

    Returns:
        The size, in the unit of the query, and the symbol, which may be empty.

    Raises:
        ValueError: The unit is unknown.
    """
    if unit.startswith("suffix:"):
        return 1.0, unit.removeprefix("suffix:")
    if unit not in _SCALES:
        raise ValueError(f"{unit!r} is not a unit of the dashboard; add it to docker/grafana/units.py.")
    smallest, *larger = _SCALES[unit]
    return next((each for each in reversed(larger) if largest >= each[0]), smallest)


def text(value: float, unit: str, largest: float | None = None) -> str:
    """Write a value with its symbol, at the scale of `largest` or of the value itself: "1.5 GiB", "20 ms", "99.5 %"."""
    size, symbol = scale(unit, abs(value) if largest is None else largest)
    number = value / size
    return f"{number:,.0f} {symbol}".rstrip() if abs(number) >= 100 else f"{number:.3g} {symbol}".rstrip()
