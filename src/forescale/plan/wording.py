"""Quantities as people read them."""

from __future__ import annotations

from forescale.plan.partition_plan import Schedule

SCHEDULE_NAMES = {Schedule.ONE_F_ONE_B: "1F1B", Schedule.EAGER_1F1B: "eager 1F1B", Schedule.GPIPE: "GPipe"}


def spell_time(seconds: float) -> str:
    """Three digits, in µs, ms or s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def spell_bytes(count: float) -> str:
    """Three digits, in B, kB, MB or GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def spell_count(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
