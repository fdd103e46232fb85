"""Runs that end in the middle: nothing that was done is lost, and the folder stays usable."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forescale as fs
from forescale.control.interrupts import Interrupts
from forescale.core.errors import CheckpointMismatch, InvalidInput, RunFailed, TaskFailed
from forescale.engine.messages import Event, StepFinished
from forescale.engine.runlog import RunLog
from integration.training_tasks import squared_loss

WIDTH, ROWS, GOOD = 16, 8, 12


class Batches:
    """Twelve good batches, then others."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(GOOD + 2):
            x = torch.ones(ROWS, WIDTH)
            yield (x if number < GOOD else self.change(x)), torch.zeros(ROWS, WIDTH)


def task(**changes: Any) -> fs.TrainingTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)),
        "loss": squared_loss,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        "batches": Batches(lambda x: x),
    }
    return fs.TrainingTask(**{**settings, **changes})


def raise_error(_: Tensor) -> Tensor:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (raise_error, rf"batch {GOOD} could not be read: OSError: the disk is gone"),
        (lambda x: x.double(), "float64, but the model was captured with float32"),
        (lambda x: x[:0], "the batch has no rows"),
    ],
)
def test_a_batch_that_cannot_be_used_loses_no_step(
    tmp_path: Path, change: Callable[[Tensor], Tensor], said: str
) -> None:
    with pytest.raises(RunFailed, match=said) as failed:
        fs.train(task(batches=Batches(change)), steps=100, devices=1, directory=tmp_path)
    assert failed.value.checkpoint == str(tmp_path / "checkpoints" / f"step-{GOOD:08d}")


def test_a_task_that_the_workers_cannot_load_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("only_here")
    exec("def loss(output, batch):\n    return output.sum()", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(RunFailed, match="No module named 'only_here'"):
        fs.train(task(loss=vars(module)["loss"]), steps=1, devices=1, directory=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_amid_an_event_ends_the_run_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    steps = list[int]()

    def interrupt(event: Event) -> None:
        if isinstance(event, StepFinished):
            steps.append(event.step)
            if event.step == 3:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # impatience must not tear what is being done

    with pytest.raises(RunFailed, match="interrupted after") as failed:
        fs.train(task(), steps=GOOD, devices=1, directory=tmp_path, checkpoint_every=2, on_event=interrupt)
    assert failed.value.checkpoint == str(tmp_path / "checkpoints" / f"step-{len(steps):08d}")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_the_failure_of_what_is_held_is_raised_before_an_interrupt() -> None:
    def fail() -> None:
        with Interrupts() as interrupts, interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fail()


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl"), pytest.raises(InvalidInput, match="another run is going on"):
        fs.train(task(), steps=1, devices=1, directory=tmp_path)


def test_a_damaged_checkpoint_is_named_before_anything_starts(tmp_path: Path) -> None:
    fs.train(task(), steps=2, devices=1, directory=tmp_path, checkpoint_every=2)
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    partial = tmp_path / "checkpoints" / "step-00000009.partial"
    partial.mkdir()
    for name in ("optimizer-00001-of-00001.safetensors", "model-00001-of-00001.safetensors"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointMismatch, match=f"{name}.*remove it"):
            fs.train(task(), steps=4, devices=1, directory=tmp_path, resume=True)
        (checkpoint / name).write_bytes(whole)
    assert partial.exists()
    assert len(fs.train(task(), steps=4, devices=1, directory=tmp_path, resume=True).steps) == 2
    assert not partial.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"cannot write the run log .*file/log\.jsonl"):
        fs.train(task(), steps=1, devices=1, directory=tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "model must be a torch.nn.Module, not NoneType"),
        ({"loss": 3}, "loss must be callable"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0; it must be above 0"),
        ({"batches": 5}, "TypeError: 'int' object is not iterable"),
        ({"batches": [(torch.zeros(0, WIDTH),) * 2]}, "the batch has no rows"),
        ({"model": nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)}, "no parameter to train"),
    ],
)
def test_a_task_that_cannot_be_trained_says_why(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskFailed, match=said):
        fs.train(task(**changes), steps=1, devices=1, directory=tmp_path)
    assert not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").stat().st_size
