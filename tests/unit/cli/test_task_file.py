"""Loading a task from a file, and what is said when that fails."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from forescale.cli.task_file import load_task
from forescale.core.errors import InvalidInput, TaskFailed

TASK = """
from torch import nn
from torch.optim import SGD
import forescale as fs

def loss(output, batch):
    return output.mean()

def make(seed=0):
    model = nn.Linear(2, 1)
    return fs.TrainingTask(model=model, loss=loss, optimizer=lambda p: SGD(p), batches=[], seed=seed)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)  # so that what loading adds is taken away again
    monkeypatch.chdir(tmp_path)
    yield Path("some_task.py")
    sys.modules.pop("task_file_some_task", None)


def test_takes_the_name_task_by_default(path: Path) -> None:
    path.write_text(TASK + "task = make(seed=1)\nother = make(seed=2)")
    assert load_task("some_task.py").seed == 1
    assert load_task("some_task.py:other").seed == 2


def test_calls_a_function(path: Path) -> None:
    path.write_text(TASK)
    assert load_task("some_task.py:make").seed == 0


def test_what_the_file_defines_is_pickled_by_value(path: Path) -> None:
    path.write_text(TASK + "task = make()")
    pickled = cloudpickle.dumps(load_task("some_task.py").loss)
    del sys.modules["task_file_some_task"]
    assert pickle.loads(pickled).__name__ == "loss"


def test_files_beside_it_can_be_imported(path: Path) -> None:
    Path("beside_some_task.py").write_text("SEED = 7")
    path.write_text(TASK + "from beside_some_task import SEED\ntask = make(SEED)")
    assert load_task("some_task.py").seed == 7


def test_a_file_may_be_named_like_a_library(path: Path) -> None:
    Path("json.py").write_text(TASK + "task = make()")
    load_task("json.py")
    assert hasattr(sys.modules["json"], "loads")
    del sys.modules["task_file_json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import does_not_exist", "some_task.py:1: ModuleNotFoundError: No module named 'does_not_exist'"),
        ("x = 1\n\ndef f():\n    return 1 / 0\n\nf()", "some_task.py:4: ZeroDivisionError: division by zero"),
        ("x = (\n", "some_task.py:1: SyntaxError: '(' was never closed"),
        ("import json\njson.loads('?')", "some_task.py:2: JSONDecodeError: "),
        ("raise SystemExit('no')", "some_task.py:1: SystemExit: no"),
        ("def task():\n    raise KeyError('a')", "some_task.py:2: KeyError: 'a'"),
        ("def task():\n    raise SystemExit('no')", "some_task.py:2: SystemExit: no"),
    ],
)
def test_a_file_that_fails_is_named_with_the_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(TaskFailed) as failed:
        load_task("some_task.py")
    assert str(failed.value).startswith(message)


def test_a_missing_name_lists_the_tasks_there_are(path: Path) -> None:
    path.write_text(TASK + "small = make()\nlarge = make()")
    with pytest.raises(
        InvalidInput, match=r"some_task.py has no task; it has small, large: write some_task.py:small"
    ):
        load_task("some_task.py")


def test_a_file_without_tasks(path: Path) -> None:
    path.write_text("x = 1")
    with pytest.raises(InvalidInput, match=r"some_task.py has no task; it defines no TrainingTask"):
        load_task("some_task.py")
    with pytest.raises(InvalidInput, match=r"x in some_task.py is not a forescale.TrainingTask, but int"):
        load_task("some_task.py:x")


@pytest.mark.parametrize("reference", ["some_task.py", "some_task.py:", "some_task.py:task"])
def test_the_name_is_task_if_none_is_given(path: Path, reference: str) -> None:
    path.write_text(TASK + "task = make()")
    assert load_task(reference) is sys.modules["task_file_some_task"].task


@pytest.mark.parametrize("reference", ["missing.py", "missing.py:task", ".", ""])
def test_a_missing_file(path: Path, reference: str) -> None:
    with pytest.raises(InvalidInput, match="there is no file"):
        load_task(reference)


def test_a_file_that_is_not_python(path: Path) -> None:
    Path("notes.txt").write_text("")
    with pytest.raises(InvalidInput, match=r"notes.txt is not a Python file"):
        load_task("notes.txt")
