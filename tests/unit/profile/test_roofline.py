from __future__ import annotations

import numpy as np
import pytest

from forescale.profile.roofline import fit_roofline

FLOPS = np.array([0.0, 0.0, 1e9, 2e9, 0.0, 5e8, 1e8])
BYTES = np.array([0.0, 0.0, 1e6, 1e6, 4e7, 8e7, 2e7])


def test_known_rates_are_found() -> None:
    seconds = 1e-5 + FLOPS / 1e11 + BYTES / 4e10
    found = fit_roofline(seconds, FLOPS, BYTES)
    assert found.dispatch_s == pytest.approx(1e-5)
    assert found.flops_per_s == pytest.approx(1e11, rel=1e-6)
    assert found.bytes_per_s == pytest.approx(4e10, rel=1e-6)
    assert found.seconds(FLOPS, BYTES) == pytest.approx(seconds)


def test_a_rate_that_never_limits_is_infinite_and_none_is_negative() -> None:
    # Time falls as bytes grow: a plain fit would give a negative cost per byte.
    flops, size_bytes = np.array([1e9, 1e9, 2e9]), np.array([1e6, 2e8, 1e6])
    found = fit_roofline(np.array([1.1e-2, 1.0e-2, 2.2e-2]), flops, size_bytes)
    assert found.bytes_per_s == np.inf
    assert found.flops_per_s > 0
    assert found.dispatch_s >= 0


def test_nothing_measured_costs_nothing() -> None:
    assert fit_roofline(np.zeros(2), FLOPS[:2], BYTES[:2]).seconds(FLOPS, BYTES) == pytest.approx(0.0)
