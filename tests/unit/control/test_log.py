from __future__ import annotations

import json
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.control.log import Header, Record, decode, encode
from forescale.control.policy import Policy
from forescale.core.errors import InvalidInput
from forescale.engine.messages import (
    BatchesAhead,
    CheckpointWritten,
    Command,
    Event,
    Repartition,
    Repartitioned,
    RunStarted,
    StageReport,
    StepFinished,
    Stop,
    WorkerExited,
)
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage, StagePrediction

PLAN = PartitionPlan(
    stages=(Stage(device="cpu0", operators=(0, 2)), Stage(device="cpu1", operators=(1, 3), recompute=True)),
    microbatches=4,
    schedule=Schedule.GPIPE,
    prediction=Prediction(
        step_s=0.1 + 0.2,
        stages=(
            StagePrediction(
                forward_s=1 / 3,
                backward_s=2e-300,
                transfer_s=0.0,
                optimizer_s=1e-9,
                busy_s=1.0,
                memory_bytes=2**60 + 1,
            ),
        ),
    ),
    rationale=("because",),
)


def step_finished(loss: float = 0.5, step_s: float = 1.0) -> StepFinished:
    return StepFinished(
        step=3,
        step_s=step_s,
        loss=loss,
        binding={"s0": 8},
        rows=8,
        tokens=64,
        stages=(
            StageReport(
                device="cpu0",
                forward_s=0.1,
                backward_s=0.2,
                optimizer_s=0.0,
                transfer_s=0.0,
                wait_s=0.0,
                cpu_s=0.3,
                memory_bytes=7,
            ),
        ),
        predicted_s=1.1,
    )


RECORDS: tuple[Record, ...] = (
    Header(policy=Policy(min_gain=0.07, adapt=False), run={"graph": {"x": [1, None, "a"]}}),
    RunStarted(plan=PLAN, next_step=0),
    BatchesAhead(first_step=2, bindings=({"s0": 1}, {"s0": 2, "s1": 3})),
    step_finished(),
    Repartition(plan=PLAN, reason="faster", before_step=None),
    Repartition(plan=PLAN, reason="faster", before_step=9),
    Repartitioned(step=4, reason="faster", pause_s=0.01, moved_bytes=5, before=PLAN, after=PLAN),
    CheckpointWritten(step=4, path="a/b"),
    WorkerExited(device="cpu0", cause="SIGKILL"),
    Stop(reason="over"),
)


def through_json(record: Record) -> Record:
    return decode(json.loads(json.dumps(encode(record), allow_nan=False)))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_reads_back_equal(record: Record) -> None:
    assert through_json(record) == record


def test_every_kind_of_event_and_command_is_tried() -> None:
    assert {type(record) for record in RECORDS} == {Header, *get_args(Event), *get_args(Command)}


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_floats_are_exact(loss: float, step_s: float) -> None:
    read = through_json(step_finished(loss, step_s))
    assert isinstance(read, StepFinished)
    assert (read.loss, read.step_s) == (loss, step_s)


def test_nan_is_kept() -> None:
    read = through_json(step_finished(math.nan))
    assert isinstance(read, StepFinished)
    assert math.isnan(read.loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "unknown record type None"),
        ({"type": "Other"}, "unknown record type 'Other'"),
        ({"type": "Stop"}, "damaged Stop record"),
        ({"type": "BatchesAhead", "first_step": 1, "bindings": 3}, "damaged BatchesAhead record"),
        ({**encode(RECORDS[0]), "version": 99}, "version 99"),
    ],
)
def test_what_is_no_record_is_refused(values: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        decode(values)
