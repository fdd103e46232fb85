"""Rows per second of a ``.pt2`` archive in a loop of its own, on given cores.

    python benchmarks/bare_loop.py replica|torch ARCHIVE CORE,CORE SECONDS ROWS,LENGTH,...

``replica`` runs it as a replica does, ``torch`` as torch loads it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.serve.formats import Order, format_named

Run = Callable[[np.ndarray], object]


def as_replica(archive: Path) -> Run:
    cpu = Device(name="cpu", kind=DeviceKind.CPU, memory_bytes=1 << 34)
    model = format_named("pt2").load(Order(path=archive), cpu)
    (given,) = model.signature.inputs
    return lambda x: model.run({given.name: x}).wait().outputs


def as_torch(archive: Path) -> Run:
    model = torch.export.load(archive).module()
    return lambda x: model(torch.from_numpy(x)).numpy()


def main() -> None:
    how, archive, cores, seconds, shape = sys.argv[1:]
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = {"replica": as_replica, "torch": as_torch}[how](Path(archive))
    sizes = [int(size) for size in shape.split(",")]
    x = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    with torch.inference_mode():
        run(x)
        start_s, rows = time.perf_counter(), 0
        while time.perf_counter() - start_s < float(seconds):
            run(x)
            rows += len(x)
    print(rows / (time.perf_counter() - start_s))


if __name__ == "__main__":
    main()
