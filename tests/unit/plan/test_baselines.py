"""What others would do with small graphs, and how it is set beside our placement."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from forescale.core.errors import InvalidInput
from forescale.plan.placement import baselines
from forescale.plan.placement.baselines import (
    compare,
    even_split,
    find_fault,
    greedy_fill,
    metis,
    pipedream,
    read_assignment,
)
from forescale.plan.placement.problem import Net
from unit.plan.placements import answer, chain


def test_an_even_split_counts_nodes_and_not_their_work() -> None:
    assert even_split(chain([9.0, 1.0, 1.0, 1.0])).tolist() == [0, 0, 1, 1]
    assert even_split(chain([1.0] * 7, count=3)).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_nodes_that_belong_together_stay_so_in_every_baseline() -> None:
    problem = replace(chain([1.0] * 6), together=((0, 5), (1, 4)))
    for device_N in (even_split(problem), greedy_fill(problem), pipedream(problem), metis(problem)):
        assert find_fault(problem, device_N) is None


def test_greedy_fills_by_bytes() -> None:
    # Of 24 bytes, the first device takes half and a margin of 1.25 mean nodes: up to 17.
    assert greedy_fill(chain([1.0] * 6, sizes=[8.0, 8.0, 2.0, 2.0, 2.0, 2.0])).tolist() == [0, 0, 1, 1, 1, 1]


def test_greedy_leaves_to_other_devices_what_no_accelerator_holds() -> None:
    assert greedy_fill(chain([1.0] * 3, sizes=[90.0, 90.0, 90.0])).tolist() == [0, 1, 2]


def test_pipedream_balances_work_where_cuts_are_cheap_and_cuts_where_they_are_not_dear() -> None:
    problem = chain([4.0, 1.0, 1.0, 2.0])
    assert pipedream(problem).tolist() == [0, 1, 1, 1]
    dear = replace(problem, nets=(Net(cost=7.0, nodes=(0, 1)), *problem.nets[1:]))
    assert pipedream(dear).tolist() == [0, 0, 1, 1]


def test_pipedream_keeps_a_device_idle_rather_than_pay_more_than_it_gains() -> None:
    assert pipedream(chain([1.0, 1.0, 1.0], cost=50.0)).tolist() == [0, 0, 0]


def test_pipedream_counts_a_tensor_once_per_reader() -> None:
    nets = (Net(cost=3.0, nodes=(0, 1, 2, 3)), Net(cost=7.0, nodes=(1, 2)), Net(cost=7.0, nodes=(2, 3)))
    # Behind node 0 cross 3 times 3, behind node 1 twice 3 and 7, behind node 2 once each.
    assert pipedream(replace(chain([2.0, 1.0, 1.0, 5.0]), nets=nets)).tolist() == [0, 0, 0, 0]
    cheap = tuple(replace(net, cost=net.cost / 3) for net in nets)
    assert pipedream(replace(chain([4.0, 1.0, 1.0, 6.0]), nets=cheap)).tolist() == [0, 0, 0, 1]


def test_metis_parts_a_graph_where_little_crosses() -> None:
    problem = chain([1.0] * 8, cost=10.0)
    nets = tuple(replace(net, cost=0.1) if net.nodes[0] == 3 else net for net in problem.nets)
    device_N = metis(replace(problem, nets=nets))
    assert len(set(device_N[:4].tolist())) == len(set(device_N[4:].tolist())) == 1
    assert device_N[0] != device_N[7]


def test_nodes_go_where_they_can_run() -> None:
    problem = chain([1.0, 1.0, 1.0, 1.0])
    work_KN = problem.work_KN.copy()
    work_KN[0, 1] = np.inf
    problem = replace(problem, work_KN=work_KN)
    for device_N in (even_split(problem), greedy_fill(problem), pipedream(problem), metis(problem)):
        assert device_N[1] == 2


def test_rows_say_how_much_longer_each_is() -> None:
    problem = chain([6.0, 1.0, 1.0, 1.0])
    placement = answer(problem, [0, 1, 1, 2])
    rows = {row.name: row for row in compare(problem, placement, own=np.array([0, 0, 0, 0]))}
    assert list(rows) == ["Forescale", "even split", "greedy (accelerate)", "PipeDream", "METIS", "your own"]
    assert rows["Forescale"].ratio == pytest.approx(1.0)
    assert rows["your own"].objective == pytest.approx(9.0)
    assert rows["your own"].ratio == pytest.approx(9 / 10)
    assert rows["even split"].objective == pytest.approx(8.0)
    assert all(row.feasible for row in rows.values())


def test_without_pymetis_the_others_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    problem = chain([6.0, 1.0])
    names = [row.name for row in compare(problem, answer(problem, [0, 1]))]
    assert "METIS" not in names
    assert "PipeDream" in names
    with pytest.raises(InvalidInput, match=r"forescale\[plan\]"):
        metis(problem)


def test_what_cannot_be_used_is_told() -> None:
    problem = chain([1.0] * 3, sizes=[60.0, 60.0, 1.0])
    assert find_fault(problem, np.array([0, 0, 1])) == "acc0 is short of 20 bytes"
    apart = replace(problem, together=((0, 2),))
    assert find_fault(apart, np.array([0, 1, 1])) == "node n0 and others that belong with it are apart"
    work_KN = problem.work_KN.copy()
    work_KN[0, 2] = np.inf
    stuck = replace(problem, work_KN=work_KN)
    row = compare(stuck, answer(stuck, [0, 1, 2]), own=np.array([0, 1, 1]))[-1]
    assert (row.objective, row.ratio, row.fault) == (None, None, "acc1 cannot run node n2")
    assert not row.feasible


def test_ones_own_assignment_is_read_with_or_without_what_surrounds_it() -> None:
    problem = chain([1.0, 1.0])
    plain = {"n0": "acc1", "n1": "cpu0"}
    assert read_assignment(problem, json.dumps(plain)).tolist() == [1, 2]
    assert read_assignment(problem, json.dumps({"objective": 3, "assignment": plain})).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"assignment": 3}', "not a JSON object"),
        ('{"n0": "acc0"}', "no device for node n1"),
        ('{"n0": "acc0", "n1": "acc7"}', "node n1 on 'acc7'; there are acc0, acc1, cpu0"),
        ('{"n0": "acc0", "n1": ["acc1"]}', "node n1 on"),
        ('{"n0": "acc0", "n1": "acc1", "n2": "acc1"}', "names node n2"),
    ],
)
def test_an_assignment_that_does_not_match_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        read_assignment(chain([1.0, 1.0]), text)
