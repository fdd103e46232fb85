"""Loads a training task from a Python file: ``FILE.py`` or ``FILE.py:NAME``."""

from __future__ import annotations

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from forescale.core.errors import InvalidInput, TaskFailed

if TYPE_CHECKING:
    from forescale.engine.train.task import TrainingTask

DEFAULT_NAME = "task"


def load_task(reference: str) -> TrainingTask:
    """The task that ``reference`` names.

    The file runs as a module of its own, with its folder on the import path as if it were run by Python.
    What it defines is sent to the workers by value, so that they need not find it.

    Args:
        reference: ``FILE.py``, which means its ``task``, or ``FILE.py:NAME``. The name is that of a
            ``TrainingTask`` or of a function without arguments that returns one.

    Raises:
        InvalidInput: there is no such file or name, or what it names is not a task.
        TaskFailed: the file's own code raised; the message begins with the place.
    """
    from forescale.engine.train.task import TrainingTask

    path, name = _split(reference)
    module = _execute(path)
    found = getattr(module, name, None)
    if callable(found):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise TaskFailed(_place_and_error(error, path)) from error
    if isinstance(found, TrainingTask):
        return found
    if hasattr(module, name):
        raise InvalidInput(f"{name} in {path} is not a forescale.TrainingTask, but {type(found).__name__}")
    others = [other for other, value in vars(module).items() if isinstance(value, TrainingTask)]
    hint = f"it has {', '.join(others)}: write {path}:{others[0]}" if others else "it defines no TrainingTask"
    raise InvalidInput(f"{path} has no {name}; {hint}")


def _split(reference: str) -> tuple[Path, str]:
    path, colon, name = reference.rpartition(":")
    path, name = (path, name or DEFAULT_NAME) if colon else (reference, DEFAULT_NAME)
    if not Path(path).is_file():
        raise InvalidInput(f"there is no file {path}")
    if Path(path).suffix != ".py":
        raise InvalidInput(f"{path} is not a Python file; its name must end in .py")
    return Path(path), name


def _execute(path: Path) -> ModuleType:
    import cloudpickle

    # A prefix, so that a file named like a library (json.py) does not take that library's place.
    spec = spec_from_file_location(f"task_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise TaskFailed(_place_and_error(error, path)) from error
    register_pickle_by_value: Any = cloudpickle.register_pickle_by_value  # it has no annotations
    register_pickle_by_value(module)
    return module


def _place_and_error(error: BaseException, path: Path) -> str:
    """``FILE:LINE: Error: message``: the last line of the task file that was being run."""
    line = 1
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == path.absolute() or Path(frame.filename) == path:
            line = frame.lineno or line
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == path.name:
        return f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}"
    return f"{path}:{line}: {type(error).__name__}: {error}"
