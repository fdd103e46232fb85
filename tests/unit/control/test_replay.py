from __future__ import annotations

from dataclasses import replace

import pytest

from chain_model import ChainCosts
from forescale.control.log import Header
from forescale.control.planner import Planner
from forescale.control.replay import replay
from forescale.core.errors import InvalidInput
from forescale.engine.messages import Repartition, Stop
from simulated_training import train


@pytest.fixture(scope="module")
def run():
    return train(60, speeds=lambda step: {"cpu1": 0.4} if step >= 30 else {})


@pytest.fixture
def planner() -> Planner:
    return Planner(ChainCosts(), max_chunks=1)


def test_forged_command_is_found(run, planner) -> None:
    records = [*run.records[:20], Stop(reason="forged"), *run.records[20:]]
    report = replay(records, planner)
    (difference,) = report.differences
    assert difference.recorded == (Stop(reason="forged"),)
    assert difference.derived == ()
    assert difference.event == 18


def test_missing_command_is_found(run, planner) -> None:
    at = next(i for i, record in enumerate(run.records) if isinstance(record, Repartition))
    report = replay([*run.records[:at], *run.records[at + 1 :]], planner)
    (difference,) = report.differences
    assert difference.derived == (run.records[at],)


def test_run_killed_before_its_last_command_was_written_is_no_difference(run, planner) -> None:
    at = next(i for i, record in enumerate(run.records) if isinstance(record, Repartition))
    report = replay(run.records[:at], planner)
    assert report.identical
    assert report.commands == (run.records[at],)


def test_resumed_run_is_decided_from_its_own_header(run, planner) -> None:
    report = replay([*run.records, *run.records], planner)
    assert report.identical
    assert report.events == 2 * replay(run.records, planner).events


def test_records_without_a_header_are_refused(run, planner) -> None:
    assert isinstance(run.records[0], Header)
    with pytest.raises(InvalidInput, match="header"):
        replay(run.records[1:], planner)


def test_other_words_for_the_same_decision_are_no_difference(run, planner) -> None:
    reworded = [
        replace(r, reason="x", plan=replace(r.plan, rationale=("y",))) if isinstance(r, Repartition) else r
        for r in run.records
    ]
    assert reworded != run.records
    assert replay(reworded, planner).identical


@pytest.mark.parametrize("change", ["plan", "step"])
def test_another_decision_in_the_same_words_is_found(run, planner, change: str) -> None:
    at, command = next((i, r) for i, r in enumerate(run.records) if isinstance(r, Repartition))
    plan = replace(command.plan, microbatches=command.plan.microbatches + 1)
    forged = replace(command, plan=plan) if change == "plan" else replace(command, before_step=50)
    (difference,) = replay([*run.records[:at], forged, *run.records[at + 1 :]], planner).differences
    assert difference.recorded == (forged,)
    assert difference.derived == (command,)
