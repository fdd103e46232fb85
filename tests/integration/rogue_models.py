"""Factories of models that misbehave, for replicas to survive."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def broken(path: Path, device: str) -> Callable:
    raise LookupError("the weights are nowhere")


def rogue(path: Path, device: str) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """A model that does what its input says, and else returns it."""

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        x = inputs["x"]
        match int(x[0, 0]):
            case 1:
                raise ZeroDivisionError("one too many")
            case 2:
                return {"y": x[:, :1]}
            case 3:
                return {"y": torch.empty(3 << 30, dtype=torch.uint8).numpy()}
            case 4:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 5:
                while True:
                    signal.sigtimedwait([], 0.1)
            case _:
                pass
        return {"y": x}

    return run
