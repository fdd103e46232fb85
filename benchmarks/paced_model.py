"""A model that takes as long as its file says, whatever else the machine does: a factory for replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def paced(path: Path, device: str) -> Run:  # noqa: ARG001 - factories are given both
    row_s = float(path.read_text())

    def run(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        time.sleep(row_s * len(inputs["x"]))
        return {"y": inputs["x"]}

    return run
