"""What would help a placement most."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forescale.plan.placement.improvements import Improvement, bottleneck, what_would_help
from forescale.plan.placement.place import place
from forescale.plan.placement.problem import PlacementProblem
from unit.plan.placements import answer, chain


def gains(problem: PlacementProblem, device_N: list[int]) -> dict[str, Improvement]:
    return {found.change: found for found in what_would_help(problem, answer(problem, device_N))}


def test_one_more_device_halves_what_is_all_work() -> None:
    found = gains(chain([4.0, 4.0, 4.0, 4.0], cost=0.0, count=1), [0, 0, 0, 0])
    best = found["one more acc"]
    assert best.objective == pytest.approx(8.0)
    assert best.gain == pytest.approx(0.5)
    assert best.most >= best.gain
    assert found["acc 25% faster"].gain == pytest.approx(0.2)
    assert "links 2 times as fast" not in found  # nothing is transferred


def test_faster_links_help_where_transfers_are_paid() -> None:
    found = gains(chain([4.0, 4.0], cost=2.0), [0, 1])
    assert found["links 2 times as fast"].objective == pytest.approx(5.0)
    assert found["links 2 times as fast"].gain == pytest.approx(1 / 6)
    assert found["one more acc"].gain == pytest.approx(0.0)


def test_memory_helps_where_it_forces_nodes_apart() -> None:
    problem = chain([1.0, 1.0], cost=30.0, sizes=[60.0, 60.0])
    found = gains(problem, [0, 2])
    assert found["25% more memory on acc"].objective == pytest.approx(2.0)  # both of 120 bytes
    larger = gains(replace(problem, memory_bytes_N=np.full(2, 64.0)), [0, 2])
    assert larger["25% more memory on acc"].objective == pytest.approx(20.0)  # both on the CPU
    assert not any("memory on cpu" in change for change in found)  # it has no limit


def test_the_greatest_gain_comes_first_and_none_is_beyond_its_limit() -> None:
    problem = chain([5.0, 1.0, 3.0, 2.0, 2.0], cost=1.5)
    found = what_would_help(problem, place(problem, contiguous=True))
    assert [one.gain for one in found] == sorted((one.gain for one in found), reverse=True)
    assert all(0 <= one.gain <= one.most + 1e-9 for one in found)
    assert {one.change for one in found} == {
        "links 2 times as fast",
        "one more acc",
        "25% more memory on acc",
        "acc 25% faster",
        "one more cpu",
        "cpu 25% faster",
    }


def test_the_present_placement_is_kept_among_more_devices() -> None:
    # In intervals nothing is this short: devices 0 and 1 in turns, and the last node on the CPU.
    problem = chain([4.0, 3.0, 3.0, 4.0, 0.1], cost=0.0)
    found = gains(problem, [0, 1, 1, 0, 2])
    assert found["one more acc"].objective <= 8.0
    assert found["one more cpu"].objective <= 8.0


def test_the_bottleneck_is_split_into_work_and_transfers() -> None:
    problem = chain([6.0, 1.0, 2.0], cost=4.0, sizes=[25.0, 1.0, 1.0])
    slow = bottleneck(problem, answer(problem, [0, 1, 1]))
    assert (slow.device, slow.work, slow.transfers) == ("acc0", 6.0, 4.0)
    assert slow.memory_fraction == pytest.approx(0.25)
    assert bottleneck(problem, answer(problem, [2, 2, 2])).memory_fraction == 0.0
