"""Quantities as people read them."""

from __future__ import annotations

import re
from math import floor, inf, log10

from forescale.core.errors import InvalidInput


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


def parse_size(text: str) -> float:
    """Bytes of ``4GB``, ``1.5 GiB`` or ``4000000000``.

    Raises:
        InvalidInput: not a size.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kMGTP]?)(i?)B)?\s*", text)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or not 0 < number < inf:
        raise InvalidInput(f"{text!r} is not a size in bytes; write it as 4GB, 1.5GiB or 4000000000")
    base = 1024 if found[3] else 1000
    return number * base ** ("", "k", "M", "G", "T", "P").index(found[2] or "")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%"
