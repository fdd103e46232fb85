"""Losses of training whose operators several workers split, against those of the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import forescale as fs
from forescale.core.errors import InvalidInput
from forescale.engine.train.task import TrainingTask
from forescale.graph.capture import capture
from forescale.plan.moves import held_by, holdings
from forescale.plan.partition_plan import Schedule
from integration import training_tasks as tasks
from integration.training import Cuts, Workers, cpus, loss_difference, plain, state_difference

FLOAT64 = torch.float64
# Sums are made in parts, in another order than in the plain loop.
SINGLE, DOUBLE = 1e-5, 1e-8
STEPS = 4

Make = Callable[[], TrainingTask]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    torch.set_num_threads(1)
    with Workers(tmp_path_factory.mktemp("run"), cpus(4)) as workers:
        yield workers


def split(*weights: int) -> Cuts:
    return Cuts(at=(), weights=(weights,))


EVEN, UNEVEN, WIDE = split(1, 1), split(7, 3), split(3, 1)
BEHIND = Cuts(at=(0.4,), weights=(None, (3, 1)))
BEFORE = Cuts(at=(0.6,), weights=((1, 1), None))
IN_TURN = Cuts(at=(0.5,), weights=((1, 1), (3, 1)))
REPLICATED = Cuts(at=(), shares=((2, 1),), weights=((3, 1),))


def mlp() -> TrainingTask:
    return TrainingTask(
        model=tasks.seeded(tasks.vector_model, FLOAT64),
        loss=tasks.class_loss,
        optimizer=tasks.momentum,
        batches=tasks.vectors(6),
    )


def exact_gpt(**changes: Any) -> Make:
    return lambda: tasks.gpt(FLOAT64, **changes)


CASES: Mapping[str, tuple[Make, Cuts, float]] = {
    "mlp": (mlp, EVEN, DOUBLE),
    "mlp, uneven": (mlp, UNEVEN, DOUBLE),
    "gpt": (tasks.gpt, EVEN, SINGLE),
    "gpt, uneven": (tasks.gpt, UNEVEN, SINGLE),
    "gpt, tied": (exact_gpt(tied=True), EVEN, DOUBLE),
    "gpt, tied, uneven, clipped": (exact_gpt(tied=True, clip_norm=0.2), WIDE, DOUBLE),
    "gpt, three shards, momentum": (exact_gpt(optimizer=tasks.momentum), split(2, 1, 1), DOUBLE),
    "gpt, recomputed": (exact_gpt(), replace(UNEVEN, recompute=True), DOUBLE),
    "gpt, lengths change": (exact_gpt(vary=True), WIDE, DOUBLE),
    "gpt, groups, scheduled": (exact_gpt(optimizer=tasks.grouped, scheduler=tasks.halving), WIDE, DOUBLE),
    "gpt, bfloat16": (lambda: tasks.gpt(autocast=torch.bfloat16), EVEN, 2e-3),
    "gpt, behind a stage": (exact_gpt(clip_norm=0.2), BEHIND, DOUBLE),
    "gpt, before a stage, tied": (exact_gpt(tied=True, clip_norm=0.2), BEFORE, DOUBLE),
    "gpt, one pair after the other, tied": (
        exact_gpt(tied=True, clip_norm=0.2),
        replace(IN_TURN, schedule=Schedule.EAGER_1F1B),
        DOUBLE,
    ),
    "gpt, replicas of shards, tied": (exact_gpt(tied=True, clip_norm=0.2), REPLICATED, DOUBLE),
    "gpt, behind a stage, gradients apart": (
        exact_gpt(tied=True, clip_norm=0.2),
        replace(BEHIND, schedule=Schedule.ZERO_BUBBLE),
        DOUBLE,
    ),
    "unet, one pair after the other, gradients apart": (
        lambda: tasks.unet(FLOAT64),
        replace(IN_TURN, schedule=Schedule.ZERO_BUBBLE),
        DOUBLE,
    ),
    "gpt of transformers": (lambda: tasks.hugging_face_gpt(FLOAT64), WIDE, DOUBLE),
    "resnet": (lambda: tasks.resnet(FLOAT64), EVEN, DOUBLE),
    "resnet, uneven, recomputed": (lambda: tasks.resnet(FLOAT64), replace(WIDE, recompute=True), DOUBLE),
    "unet, uneven": (lambda: tasks.unet(FLOAT64), WIDE, DOUBLE),
    "two heads": (tasks.two_heads, EVEN, DOUBLE),
    "frozen and unused parameters": (tasks.frozen, UNEVEN, DOUBLE),
    "running mean": (tasks.running_mean, EVEN, DOUBLE),
    "mixture of experts": (tasks.mixture, EVEN, DOUBLE),
    "whole modules": (tasks.untraceable, EVEN, DOUBLE),
    "recurrent": (tasks.recurrent, EVEN, DOUBLE),
}


@pytest.mark.parametrize("name", CASES)
def test_training_in_shards_is_the_plain_loop(name: str, workers: Workers) -> None:
    make, cuts, tolerance = CASES[name]
    reference = plain(make(), STEPS, cuts.microbatches)
    trained = workers.train(make(), cuts, STEPS)
    assert loss_difference(trained, reference) <= tolerance
    assert state_difference(trained, reference) <= 30 * tolerance
    assert trained.losses[-1] != trained.losses[0]


@pytest.mark.parametrize("make", [mlp, tasks.gpt, tasks.unet, tasks.resnet])
def test_shards_hold_parts_of_their_parameters(make: Make) -> None:
    """Otherwise the losses above would be right without anything having been split."""
    task = make()
    args, kwargs = task.call(next(iter(task.batches)))
    graph = capture(task.model, args, kwargs, task.autocast).graph
    held = holdings(graph, WIDE.plan(graph))
    whole = sum(p.numel() for p in task.model.parameters())
    larger, smaller = (
        sum(
            torch.Size(extent.shape(graph.parameters[n].shape)).numel()
            for n, extent in held_by(held, device).items()
            if n in graph.parameters
        )
        for device in ("cpu0", "cpu1")
    )
    assert smaller < larger < 0.9 * whole
    assert larger + smaller < 1.5 * whole


def test_dropout_is_the_same_in_shards(workers: Workers) -> None:
    one = workers.train(tasks.gpt(FLOAT64, dropout=0.1), Cuts(at=()), STEPS)
    for cuts in (UNEVEN, replace(EVEN, recompute=True), BEHIND):
        several = workers.train(tasks.gpt(FLOAT64, dropout=0.1), cuts, STEPS)
        assert loss_difference(one, several) <= DOUBLE
        assert state_difference(one, several) <= 30 * DOUBLE


REPARTITIONS: Mapping[str, tuple[Make, Mapping[int, Cuts]]] = {
    "gpt, to shards and back": (
        exact_gpt(clip_norm=0.5, scheduler=tasks.halving),
        {0: Cuts(at=()), 1: WIDE, 2: EVEN, 3: Cuts(), 4: UNEVEN, 5: Cuts(at=(), devices=(1,))},
    ),
    "gpt, tied, among groups of shards": (
        exact_gpt(tied=True),
        {
            0: BEFORE,
            1: replace(WIDE, devices=(3, 1)),
            2: IN_TURN,
            3: REPLICATED,
            4: split(2, 1, 1),
            5: Cuts(at=(0.3, 0.7)),
        },
    ),
    "resnet": (
        lambda: tasks.resnet(FLOAT64),
        {0: Cuts(), 1: WIDE, 2: replace(EVEN, devices=(2, 1)), 3: BEHIND, 4: Cuts(at=())},
    ),
    "mlp, momentum": (mlp, {0: EVEN, 2: UNEVEN, 3: split(1, 1, 1), 4: Cuts(at=())}),
}


@pytest.mark.parametrize("name", REPARTITIONS)
def test_repartitions_to_and_from_shards_change_nothing(name: str, workers: Workers) -> None:
    make, cuts = REPARTITIONS[name]
    reference = plain(make(), 6, 4)
    trained = workers.train(make(), cuts, 6)
    assert [r.step for r in trained.repartitions] == [step for step in cuts if step]
    assert loss_difference(trained, reference) <= DOUBLE
    assert state_difference(trained, reference) <= 30 * DOUBLE


@pytest.mark.parametrize(
    ("before", "after"),
    [(WIDE, Cuts()), (Cuts(), UNEVEN), (REPLICATED, BEHIND)],
    ids=["to a pipeline", "from a pipeline", "among groups of shards"],
)
def test_resumed_training_goes_on_as_if_it_had_not_stopped(
    before: Cuts, after: Cuts, workers: Workers
) -> None:
    def task() -> TrainingTask:
        return tasks.gpt(FLOAT64, tied=True, dropout=0.1, scheduler=tasks.halving, clip_norm=0.5)

    whole = workers.train(task(), before, STEPS, checkpoint_at=2)
    assert whole.checkpoint is not None
    resumed = workers.train(task(), after, STEPS, resume=whole.checkpoint)
    assert resumed.losses == pytest.approx(whole.losses[2:], abs=DOUBLE)
    assert state_difference(resumed, whole) <= 30 * DOUBLE


def test_checkpoints_hold_whole_parameters(workers: Workers) -> None:
    trained = workers.train(tasks.gpt(tied=True), WIDE, 2, checkpoint_at=2)
    assert trained.checkpoint is not None
    model = tasks.gpt(tied=True).model
    model.load_state_dict(fs.load_checkpoint(trained.checkpoint))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trained.state.items())


def test_an_optimizer_that_needs_whole_parameters_is_refused(workers: Workers) -> None:
    with pytest.raises(InvalidInput, match="Adafactor cannot step a part"):
        workers.train(tasks.gpt(FLOAT64, optimizer=tasks.adafactor), EVEN, 1)
