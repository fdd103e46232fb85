"""Quantities as people read them."""

from __future__ import annotations

import pytest

from forescale.cli.units import moved, seconds, si, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1.00 B"),
        (12, "12.0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (12_345_678, "12.3 MB"),
        (999_999, "1.00 MB"),
        (2.5e18, "2500 PB"),
    ],
)
def test_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert size(value) == text


def test_small_values() -> None:
    assert [seconds(0.0123), seconds(45e-6), seconds(2.5), seconds(3e-12)] == [
        "12.3 ms",
        "45.0 µs",
        "2.50 s",
        "0.00 ns",
    ]
    assert si(-1500, "FLOP") == "-1.50 kFLOP"


def test_nothing_was_moved() -> None:
    assert moved(0) == "nothing"
    assert moved(598_000) == "598 kB"
