"""Losses of pipelined training against those of the plain loop with the same microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import forescale as fs
from forescale.core.errors import InvalidInput, TaskFailed
from forescale.engine.train.task import TrainingTask
from forescale.plan.partition_plan import Schedule
from integration import training_tasks as tasks
from integration.training import Cuts, Workers, loss_difference, plain, state_difference

GPIPE = Schedule.GPIPE
FLOAT64 = torch.float64

# Losses are about 4; one unit in the last place of a float32 there is 4.8e-7.
UNTIED, TIED, EXACT = 1e-6, 1e-5, 1e-11
# Replicas sum the microbatches' gradients in another order, and where a gradient is nothing but rounding,
# AdamW makes a step of it all the same.
REORDERED = 1e-8

Make = Callable[[], TrainingTask]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    torch.set_num_threads(1)
    with Workers(tmp_path_factory.mktemp("run")) as workers:
        yield workers


THREE = Cuts(at=(0.3, 0.7))
APART = replace(THREE, schedule=Schedule.ZERO_BUBBLE)
TURNS = Cuts(at=(0.25, 0.5, 0.75), devices=(0, 1, 0, 1), schedule=Schedule.INTERLEAVED)
EVEN, UNEVEN = Cuts(at=(), shares=((1, 1),)), Cuts(at=(), shares=((3, 1),))
FIRST_TWICE = Cuts(at=(0.4,), shares=((1, 1), (1,)))
LAST_TWICE = Cuts(at=(0.6,), shares=((1,), (2, 1)))
CASES: Mapping[str, tuple[Make, Cuts, float]] = {
    "one device": (tasks.gpt, Cuts(at=()), UNTIED),
    "gpt": (tasks.gpt, Cuts(), UNTIED),
    "gpt, 3 stages": (tasks.gpt, THREE, UNTIED),
    "gpt, 3 stages, scattered": (tasks.gpt, replace(THREE, scatter=1), UNTIED),
    "gpt, gpipe": (tasks.gpt, replace(THREE, schedule=GPIPE), UNTIED),
    "gpt, eager 1f1b": (tasks.gpt, replace(THREE, schedule=Schedule.EAGER_1F1B), UNTIED),
    "gpt, recomputed": (tasks.gpt, replace(THREE, recompute=True), UNTIED),
    "gpt, tied": (lambda: tasks.gpt(tied=True), Cuts(), TIED),
    "gpt, tied, 3 stages": (lambda: tasks.gpt(tied=True), replace(THREE, scatter=2), TIED),
    "gpt, tied, exact": (lambda: tasks.gpt(FLOAT64, tied=True), THREE, EXACT),
    "gpt, lengths change": (lambda: tasks.gpt(vary=True), THREE, UNTIED),
    "gpt, lengths change, exact": (lambda: tasks.gpt(FLOAT64, vary=True), replace(THREE, scatter=3), EXACT),
    "gpt, bfloat16": (lambda: tasks.gpt(autocast=torch.bfloat16), THREE, UNTIED),
    "gpt, clipped and scheduled": (
        lambda: tasks.gpt(FLOAT64, clip_norm=0.2, scheduler=tasks.halving),
        THREE,
        EXACT,
    ),
    "gpt, tied and clipped": (lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.2), THREE, EXACT),
    "gpt, groups": (lambda: tasks.gpt(FLOAT64, optimizer=tasks.grouped), THREE, EXACT),
    "gpt, momentum": (lambda: tasks.gpt(FLOAT64, optimizer=tasks.momentum), THREE, EXACT),
    "gpt, adafactor": (lambda: tasks.gpt(FLOAT64, optimizer=tasks.adafactor), THREE, EXACT),
    "gpt, weighted by tokens": (
        lambda: tasks.gpt(
            FLOAT64, batches=tasks.padded_texts(6), loss=tasks.padded_loss, weight=tasks.unpadded_tokens
        ),
        THREE,
        EXACT,
    ),
    "gpt of transformers": (tasks.hugging_face_gpt, THREE, TIED),
    "gpt of transformers, exact": (lambda: tasks.hugging_face_gpt(FLOAT64), replace(THREE, scatter=4), EXACT),
    "resnet": (tasks.resnet, THREE, UNTIED),
    "resnet, scattered, recomputed": (
        lambda: tasks.resnet(FLOAT64),
        replace(THREE, scatter=5, recompute=True),
        EXACT,
    ),
    "unet": (tasks.unet, THREE, UNTIED),
    "unet, scattered": (lambda: tasks.unet(FLOAT64), replace(THREE, scatter=6, schedule=GPIPE), EXACT),
    "two heads": (tasks.two_heads, Cuts(at=(0.6, 0.8)), EXACT),
    "two heads, one device": (tasks.two_heads, Cuts(at=()), EXACT),
    "running mean": (tasks.running_mean, THREE, EXACT),
    "running mean, recomputed": (tasks.running_mean, replace(THREE, recompute=True), EXACT),
    "mixture of experts": (tasks.mixture, replace(THREE, scatter=7), EXACT),
    "whole modules": (tasks.untraceable, THREE, EXACT),
    "whole modules, recomputed": (tasks.untraceable, replace(THREE, recompute=True, schedule=GPIPE), EXACT),
    "tensors of all kinds": (tasks.crossing, Cuts(at=(0.25, 0.5)), EXACT),
    "frozen and unused parameters": (tasks.frozen, THREE, EXACT),
    "no_grad, detach, batch is a tensor": (tasks.reconstruction, THREE, EXACT),
    "nested batch": (tasks.nested, Cuts(), EXACT),
    "optimizer instance": (tasks.with_optimizer_instance, THREE, EXACT),
    "numbers made of sizes": (tasks.shape_numbers, THREE, EXACT),
    "reentrant checkpoints": (tasks.checkpointed, THREE, EXACT),
    "batch is a dataclass": (tasks.labelled, THREE, EXACT),
    "recurrent": (tasks.recurrent, Cuts(at=(0.1, 0.6)), EXACT),
    "zero-bubble": (lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.2), APART, EXACT),
    "zero-bubble, uneven microbatches, lengths change": (
        lambda: tasks.gpt(FLOAT64, vary=True),
        replace(APART, scatter=3),
        EXACT,
    ),
    "zero-bubble, bfloat16": (lambda: tasks.gpt(autocast=torch.bfloat16), APART, UNTIED),
    "zero-bubble, gpt of transformers": (lambda: tasks.hugging_face_gpt(FLOAT64), APART, EXACT),
    "zero-bubble, resnet": (lambda: tasks.resnet(FLOAT64), APART, EXACT),
    "zero-bubble, scattered, recomputed": (
        lambda: tasks.resnet(FLOAT64),
        replace(APART, scatter=5, recompute=True),
        EXACT,
    ),
    "zero-bubble, frozen and unused parameters": (tasks.frozen, APART, EXACT),
    "zero-bubble, two heads": (tasks.two_heads, replace(APART, at=(0.6, 0.8)), EXACT),
    "zero-bubble, mixture of experts": (tasks.mixture, replace(APART, scatter=7), EXACT),
    "zero-bubble, one device": (tasks.unet, replace(APART, at=()), UNTIED),
    "zero-bubble, replicas of the first stage": (
        lambda: tasks.gpt(FLOAT64, tied=True),
        replace(FIRST_TWICE, schedule=Schedule.ZERO_BUBBLE),
        REORDERED,
    ),
    "interleaved": (lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.2), TURNS, EXACT),
    "interleaved, scattered, lengths change": (
        lambda: tasks.gpt(FLOAT64, vary=True),
        replace(TURNS, scatter=3, microbatches=5),
        EXACT,
    ),
    "interleaved, 3 devices": (
        lambda: tasks.gpt(FLOAT64, tied=True),
        replace(TURNS, at=(0.1, 0.3, 0.5, 0.7, 0.9), devices=(2, 0, 1) * 2, microbatches=4),
        EXACT,
    ),
    "interleaved, 3 stages of each": (
        lambda: tasks.gpt(FLOAT64),
        replace(TURNS, at=(0.1, 0.3, 0.5, 0.7, 0.9), devices=(0, 1) * 3, microbatches=7),
        EXACT,
    ),
    "interleaved, resnet": (lambda: tasks.resnet(FLOAT64), TURNS, EXACT),
    "interleaved, unet, recomputed": (
        lambda: tasks.unet(FLOAT64),
        replace(TURNS, recompute=True, scatter=4),
        EXACT,
    ),
    "interleaved, bfloat16": (lambda: tasks.gpt(autocast=torch.bfloat16), TURNS, UNTIED),
    "interleaved, two heads": (tasks.two_heads, replace(TURNS, at=(0.4, 0.6, 0.8)), EXACT),
    "interleaved, frozen and unused parameters": (tasks.frozen, TURNS, EXACT),
    "interleaved, one microbatch": (lambda: tasks.gpt(FLOAT64), replace(TURNS, microbatches=1), EXACT),
    "replicas": (tasks.gpt, EVEN, TIED),
    "replicas, tied": (lambda: tasks.gpt(tied=True), UNEVEN, TIED),
    "replicas, tied and clipped": (lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.2), UNEVEN, REORDERED),
    "replicas, scheduled, groups": (
        lambda: tasks.gpt(FLOAT64, optimizer=tasks.grouped, scheduler=tasks.halving),
        replace(UNEVEN, shares=((5, 1, 2),), microbatches=8),
        REORDERED,
    ),
    "replicas, adafactor, recomputed": (
        lambda: tasks.gpt(FLOAT64, optimizer=tasks.adafactor),
        replace(EVEN, recompute=True),
        REORDERED,
    ),
    "replicas, bfloat16": (lambda: tasks.gpt(autocast=torch.bfloat16), EVEN, TIED),
    "replicas, lengths change": (lambda: tasks.gpt(FLOAT64, vary=True), UNEVEN, REORDERED),
    "replicas, weighted by tokens": (
        lambda: tasks.gpt(
            FLOAT64, batches=tasks.padded_texts(6), loss=tasks.padded_loss, weight=tasks.unpadded_tokens
        ),
        UNEVEN,
        REORDERED,
    ),
    "replicas, more than microbatches": (
        lambda: tasks.gpt(FLOAT64),
        replace(UNEVEN, shares=((2, 1, 1),), microbatches=2),
        REORDERED,
    ),
    "replicas, momentum": (lambda: tasks.gpt(FLOAT64, optimizer=tasks.momentum), UNEVEN, EXACT),
    "replicas, two heads": (tasks.two_heads, UNEVEN, REORDERED),
    "replicas, frozen and unused parameters": (tasks.frozen, replace(EVEN, shares=((1, 1, 1),)), REORDERED),
    "replicas, mixture of experts": (tasks.mixture, UNEVEN, REORDERED),
    "replicas of the first stage": (
        lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.2),
        FIRST_TWICE,
        REORDERED,
    ),
    "replicas of the last stage": (lambda: tasks.gpt(FLOAT64, tied=True), LAST_TWICE, REORDERED),
    "replicas of the last stage, two heads": (tasks.two_heads, LAST_TWICE, REORDERED),
    "replicas of the first stage, eager 1f1b": (
        lambda: tasks.gpt(FLOAT64),
        replace(FIRST_TWICE, shares=((3, 1), (1,)), microbatches=9, schedule=Schedule.EAGER_1F1B, scatter=3),
        REORDERED,
    ),
    "replicas of the last stage, gpipe": (tasks.unet, replace(LAST_TWICE, schedule=GPIPE), UNTIED),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a reentrant checkpoint's remark
@pytest.mark.parametrize("name", CASES)
def test_pipelined_training_is_the_plain_loop(name: str, workers: Workers) -> None:
    make, cuts, tolerance = CASES[name]
    reference = plain(make(), 6, cuts.microbatches)
    trained = workers.train(make(), cuts, 6)
    assert loss_difference(trained, reference) <= tolerance
    # Parameters differ by more than losses: AdamW divides by gradients that may be tiny.
    assert state_difference(trained, reference) <= max(1e-9, 30 * tolerance)
    assert trained.losses[-1] != trained.losses[0]


def test_buffers_count_every_batch_once(workers: Workers) -> None:
    trained = workers.train(tasks.resnet(), Cuts(recompute=True), 6)
    counters = {n: int(t) for n, t in trained.state.items() if n.endswith("num_batches_tracked")}
    assert counters
    assert set(counters.values()) == {6 * 4}


def test_dropout_is_the_same_however_the_model_is_cut(workers: Workers) -> None:
    def task() -> TrainingTask:
        return tasks.gpt(FLOAT64, dropout=0.1)

    one = workers.train(task(), Cuts(at=()), 6)
    assert loss_difference(one, workers.train(replace(task(), seed=1), Cuts(at=()), 6)) > 1e-3
    ways = (
        Cuts(),
        replace(THREE, scatter=8),
        replace(THREE, recompute=True, schedule=GPIPE),
        UNEVEN,
        LAST_TWICE,
    )
    for cuts in ways:
        several = workers.train(task(), cuts, 6)
        assert loss_difference(one, several) <= (REORDERED if cuts.shares else EXACT)
        assert state_difference(one, several) <= (30 * REORDERED if cuts.shares else 1e-9)


REPARTITIONS: Mapping[str, tuple[Make, Mapping[int, Cuts], float]] = {
    "untied": (tasks.gpt, {0: Cuts(), 2: Cuts(at=(0.2,)), 4: Cuts(at=(0.7,)), 5: THREE}, UNTIED),
    "tied, to and from an idle device": (
        lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.5, scheduler=tasks.halving),
        {
            0: Cuts(devices=(0, 1)),
            2: Cuts(at=(0.3,), devices=(2, 0)),
            3: replace(THREE, scatter=9),
            5: Cuts(at=(), devices=(1,)),
        },
        EXACT,
    ),
    "to replicas and back": (
        lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.5, scheduler=tasks.halving),
        {0: Cuts(), 2: UNEVEN, 3: replace(EVEN, devices=(2, 1)), 4: FIRST_TWICE, 5: THREE},
        REORDERED,
    ),
    "buffers": (
        lambda: tasks.resnet(FLOAT64),
        {0: THREE, 2: Cuts(devices=(1, 2)), 3: Cuts(at=(0.8,), devices=(2, 0)), 5: THREE},
        EXACT,
    ),
    "running mean": (
        tasks.running_mean,
        {0: Cuts(), 2: Cuts(at=(0.8,)), 3: THREE, 5: Cuts(at=(0.2,))},
        EXACT,
    ),
    "whole modules": (
        tasks.untraceable,
        {0: Cuts(), 2: Cuts(at=(0.8,)), 3: THREE, 5: Cuts(at=(0.2,))},
        EXACT,
    ),
    "factored state": (
        lambda: tasks.gpt(FLOAT64, optimizer=tasks.adafactor),
        {0: Cuts(), 2: Cuts(at=(0.2,)), 3: THREE, 4: Cuts(at=(0.7,))},
        EXACT,
    ),
    "to interleaved, zero-bubble and back": (
        lambda: tasks.gpt(FLOAT64, tied=True, clip_norm=0.5),
        {
            0: THREE,
            1: TURNS,
            2: APART,
            3: replace(TURNS, devices=(2, 0, 2, 0)),
            4: replace(APART, at=(0.6,)),
            5: Cuts(),
        },
        EXACT,
    ),
    "microbatches and schedule": (
        lambda: tasks.gpt(FLOAT64),
        {
            0: Cuts(),
            2: Cuts(microbatches=2),
            3: Cuts(microbatches=8, schedule=GPIPE),
            4: Cuts(microbatches=1),
        },
        EXACT,
    ),
}


@pytest.mark.parametrize("name", REPARTITIONS)
def test_three_repartitions_change_nothing(name: str, workers: Workers) -> None:
    make, cuts, tolerance = REPARTITIONS[name]
    reference = plain(make(), 6, lambda step: cuts[max(s for s in cuts if s <= step)].microbatches)
    trained = workers.train(make(), cuts, 6)
    assert [r.step for r in trained.repartitions] == [step for step in cuts if step]
    assert loss_difference(trained, reference) <= tolerance
    assert state_difference(trained, reference) <= max(1e-9, 30 * tolerance)


def test_a_loss_that_reads_the_models_parameters_is_refused(workers: Workers) -> None:
    with pytest.raises(TaskFailed, match=r"uses the model's parameter 0\.weight"):
        workers.train(tasks.with_the_model_in_the_loss(), Cuts(), 1)


def test_replicas_of_a_stage_that_changes_buffers_are_refused(workers: Workers) -> None:
    with pytest.raises(
        InvalidInput, match="cpu0 and cpu1 cannot be replicas of one stage: its forward changes"
    ):
        workers.train(tasks.resnet(), EVEN, 1)


@pytest.mark.parametrize(
    "before", [THREE, UNEVEN, APART, TURNS], ids=["pipeline", "replicas", "zero-bubble", "turns"]
)
@pytest.mark.parametrize("after", [Cuts(at=(0.6,)), EVEN], ids=["to pipeline", "to replicas"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resumed_training_goes_on_as_if_it_had_not_stopped(
    tied: bool, before: Cuts, after: Cuts, workers: Workers
) -> None:
    def task() -> TrainingTask:
        return tasks.gpt(FLOAT64, tied=tied, dropout=0.1, scheduler=tasks.halving, clip_norm=0.5)

    whole = workers.train(task(), before, 6, checkpoint_at=3)
    assert whole.checkpoint is not None
    resumed = workers.train(task(), after, 6, resume=whole.checkpoint)
    tolerance = EXACT if before.shares == after.shares else REORDERED
    assert resumed.losses == pytest.approx(whole.losses[3:], abs=tolerance)
    assert state_difference(resumed, whole) <= max(1e-9, 30 * tolerance)


def test_a_device_runs_several_stages_only_where_devices_take_turns(workers: Workers) -> None:
    for wrong in (replace(TURNS, schedule=Schedule.ONE_F_ONE_B), replace(TURNS, devices=(0, 1, 1, 0))):
        with pytest.raises(InvalidInput, match=r"named twice|must take turns"):
            workers.train(tasks.gpt(), wrong, 1)


def test_a_checkpoint_loads_into_the_plain_model(workers: Workers, tmp_path: Path) -> None:
    trained = workers.train(tasks.gpt(tied=True), THREE, 3, checkpoint_at=3)
    assert trained.checkpoint is not None
    model = tasks.gpt(tied=True).model
    model.load_state_dict(fs.load_checkpoint(trained.checkpoint))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.state.items())
    assert torch.equal(state["head.weight"], state["tokens.weight"])
    assert set(fs.load_checkpoint(trained.checkpoint)) == set(state)


def test_a_model_that_cannot_be_traced_is_profiled_planned_and_trained(tmp_path: Path) -> None:
    report = fs.train(tasks.untraceable(), steps=4, devices=2, adapt=False, directory=tmp_path)
    plan = report.plans[0]
    assert plan.microbatches <= 5  # of ten rows: BatchNorm needs two
    reference = plain(tasks.untraceable(), 4, plan.microbatches)
    assert list(report.losses) == pytest.approx(reference.losses, abs=EXACT)
