"""Forescale: profiles, predicts, partitions and re-partitions models while they run.

The public names below are imported on first use, so that ``import forescale`` stays light: nothing
loads PyTorch until a name that needs it is touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forescale.api.client import Client
    from forescale.control.policy import Policy
    from forescale.control.report import TrainingReport
    from forescale.control.run import train
    from forescale.engine.train.shards import load_checkpoint
    from forescale.engine.train.task import TrainingTask

__version__ = "0.1.0"

# name -> module that defines it; the imports above repeat it for type checkers
_PUBLIC = {
    "Client": "forescale.api.client",
    "Policy": "forescale.control.policy",
    "TrainingReport": "forescale.control.report",
    "TrainingTask": "forescale.engine.train.task",
    "load_checkpoint": "forescale.engine.train.shards",
    "train": "forescale.control.run",
}

__all__ = ["Client", "Policy", "TrainingReport", "TrainingTask", "__version__", "load_checkpoint", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'forescale' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
