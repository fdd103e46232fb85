"""Quantities as people read them."""

from __future__ import annotations

from math import floor, log10


def si(value: float, unit: str) -> str:
    """Three digits and a prefix: ``12.3 MB``, ``4.56 GFLOP/s``, ``120 µs``."""
    if not value:
        return f"0 {unit}"
    rounded = float(f"{value:.3g}")
    magnitude = floor(log10(abs(rounded)))
    power = min(max(magnitude // 3, -3), 5)
    digits = min(max(2 - magnitude + 3 * power, 0), 2)
    prefix = ("n", "µ", "m", "", "k", "M", "G", "T", "P")[power + 3]
    return f"{rounded / 1000.0**power:.{digits}f} {prefix}{unit}"


def seconds(value_s: float) -> str:
    return si(value_s, "s")


def size(value_bytes: float) -> str:
    return si(value_bytes, "B")


def moved(value_bytes: float) -> str:
    """A size for a text or column that says it was moved."""
    return size(value_bytes) if value_bytes else "nothing"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%"
