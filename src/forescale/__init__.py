"""Forescale: profiles, predicts, partitions and re-partitions models while they run.

The public names below are imported on first use, so that ``import forescale`` stays light: nothing
loads PyTorch until a name that needs it is touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forescale.engine.train.api import TrainingReport, train
    from forescale.engine.train.task import TrainingTask

__version__ = "0.1.0"

# name -> module that defines it; the imports above repeat it for type checkers
_PUBLIC = {
    "TrainingReport": "forescale.engine.train.api",
    "TrainingTask": "forescale.engine.train.task",
    "train": "forescale.engine.train.api",
}

__all__ = ["TrainingReport", "TrainingTask", "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'forescale' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
