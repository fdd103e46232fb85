"""A clock for tests."""

from __future__ import annotations


class Ticks:
    """One second passes between any two looks."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def wall_s(self) -> float:
        return self.monotonic_s()
