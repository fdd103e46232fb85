from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

import forescale as fs
from forescale.core.errors import InvalidInput
from forescale.engine.train.task import TrainingTask
from forescale.profile.devices import find_cluster
from integration import training_tasks as tasks
from integration.training import Cuts, Workers, loss_difference, plain, state_difference
from models import GPT

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

# Kernels of a GPU add up in an order that changes from run to run.
SAME_KERNELS, ANY_KERNELS = 1e-5, 1e-4

ONE = Cuts(at=())
Make = Callable[[], TrainingTask]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with Workers(tmp_path_factory.mktemp("run"), find_cluster(min(GPUS, 2))) as workers:
        yield workers


def on_gpu(task: TrainingTask) -> TrainingTask:
    """The task with model and batches on the GPU, as the plain loop needs it."""
    batches = [
        pytree.tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, b) for b in task.batches
    ]
    return replace(task, model=task.model.cuda(), batches=batches)


TASKS: dict[str, Make] = {
    "gpt": tasks.gpt,
    "gpt, lengths change": lambda: tasks.gpt(vary=True),
    "gpt, tied and clipped": lambda: tasks.gpt(tied=True, clip_norm=0.2, scheduler=tasks.halving),
    "resnet": tasks.resnet,
    "unet": tasks.unet,
    "two heads": tasks.two_heads,
}


@pytest.mark.parametrize("name", TASKS)
def test_one_gpu_is_the_plain_loop_on_that_gpu(name: str, workers: Workers) -> None:
    reference = plain(on_gpu(TASKS[name]()), 6, 4)
    trained = workers.train(TASKS[name](), ONE, 6)
    assert loss_difference(trained, reference) <= ANY_KERNELS
    assert trained.losses[-1] != trained.losses[0]


def test_a_model_that_lies_on_the_gpu_casts_as_autocast_does_there(workers: Workers) -> None:
    def task() -> TrainingTask:
        return on_gpu(tasks.gpt(autocast=torch.bfloat16))

    single = plain(on_gpu(tasks.gpt()), 6, 4)
    reference = plain(task(), 6, 4)
    trained = workers.train(task(), ONE, 6)
    assert loss_difference(trained, reference) < 0.2 * loss_difference(single, reference)


def test_dropout_is_repeated_by_a_recomputation(workers: Workers) -> None:
    def task() -> TrainingTask:
        return tasks.gpt(dropout=0.1)

    one = workers.train(task(), ONE, 6)
    recomputed = workers.train(task(), replace(ONE, recompute=True), 6)
    assert loss_difference(one, recomputed) <= SAME_KERNELS
    assert loss_difference(one, workers.train(replace(task(), seed=1), ONE, 6)) > 1e-3


def test_resumed_training_has_its_optimizer_state_on_the_gpu(workers: Workers) -> None:
    whole = workers.train(tasks.gpt(), ONE, 6, checkpoint_at=3)
    resumed = workers.train(tasks.gpt(), ONE, 6, resume=whole.checkpoint)
    assert resumed.losses == pytest.approx(whole.losses[3:], abs=SAME_KERNELS)


def test_peak_memory_is_as_predicted(tmp_path: Path) -> None:
    model = GPT(vocabulary=4096, width=1024, blocks=6, heads=16, context=256)
    ids = torch.randint(0, 4096, (32, 257))
    task = TrainingTask(
        model=model,
        loss=tasks.token_loss,
        optimizer=tasks.adamw,
        batches=[(ids[:, :-1], ids[:, 1:])] * 4,
    )
    report = fs.train(task, steps=4, devices=1, directory=tmp_path, adapt=False)
    (measured,) = report.steps[-1].stages
    (predicted,) = report.plans[0].prediction.stages
    assert predicted.memory_bytes == pytest.approx(measured.memory_bytes, rel=0.03)


def test_a_small_step_takes_less_memory_than_a_large_one_before_it(workers: Workers) -> None:
    batches = [tasks.texts(1, rows=64, length=100)[0], *tasks.texts(2, rows=2, length=10)]
    trained = workers.train(tasks.gpt(batches=batches), ONE, 3)
    peaks = [max(stage.memory_bytes for stage in step.stages) for step in trained.steps]
    assert 0 < peaks[2] < peaks[0]


def test_more_devices_than_gpus_are_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"ask for fewer, or set CUDA_VISIBLE_DEVICES="):
        find_cluster(GPUS + 1)


@two_gpus
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("scatter", [None, 1])
def test_two_gpus_are_one_gpu(name: str, scatter: int | None, workers: Workers) -> None:
    one = workers.train(TASKS[name](), ONE, 6)
    two = workers.train(TASKS[name](), Cuts(scatter=scatter), 6)
    assert loss_difference(one, two) <= ANY_KERNELS


@two_gpus
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_repartitions_that_move_both_ways_change_nothing(tied: bool, workers: Workers) -> None:
    def task() -> TrainingTask:
        return tasks.gpt(tied=tied, clip_norm=0.5)

    one = workers.train(task(), ONE, 6)
    cuts = {0: Cuts(), 2: Cuts(devices=(1, 0)), 3: Cuts(at=(0.2,)), 5: Cuts(at=(), devices=(1,))}
    moved = workers.train(task(), cuts, 6)
    assert [r.step for r in moved.repartitions] == [2, 3, 5]
    assert all(r.moved_bytes and r.pause_s for r in moved.repartitions)
    assert loss_difference(one, moved) <= ANY_KERNELS
    assert state_difference(moved, one) <= 30 * ANY_KERNELS
