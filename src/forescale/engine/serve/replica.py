"""A replica process: one model, one batch at a time.

``main`` is the entry of a ``ProcessSpec``. It imports torch and waits for a model, a warm spare until then.
Its config may hold ``memory_limit_bytes`` and ``factories``, the names that ``formats/factory.py`` may call.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import ForescaleError
from forescale.engine.channel import Channel, Message
from forescale.engine.serve.arrays import DTYPES, Array, pack, unpack
from forescale.engine.serve.conformity import Misfit, conform, rows_of
from forescale.engine.serve.footprint import Footprint, be_first_victim
from forescale.engine.serve.formats import LoadedModel, Order, format_named
from forescale.engine.serve.messages import (
    Beat,
    Credit,
    Drain,
    Failed,
    FailureKind,
    Hello,
    Load,
    Result,
    Run,
    Warm,
    to_replica,
)

BEAT_S = 1.0
CREDITS = 2  # the next batch waits here while one runs

# What torch imports when it first deserializes and runs an exported program: 3 s that a spare spends early.
_WARM_IMPORTS = (
    "torch.export.pt2_archive._package",
    "torch._export.serde.serialize",
    "torch.export._trace",
    "torch.export.passes",
    "torch._inductor.sizevars",
    "sympy.tensor.tensor",
)
_UNNAMED_ROWS = (
    2  # of an axis of any length that is not the rows: the least that torch.export allows by itself
)
_FULL_FRACTION = 0.8  # a process that still holds this much of its memory after a batch failed is replaced


def main(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    """Become a replica of the model that ``Load`` names, until ``Drain``; see ``messages.py``."""
    torch.set_num_threads(len(device.cores) or psutil.cpu_count() or 1)
    for module in _WARM_IMPORTS:
        import_module(module)
    limit_bytes = int(config.get("memory_limit_bytes") or device.memory_bytes)
    _limit_memory(device, limit_bytes)
    be_first_victim()
    gc.collect()
    gc.freeze()  # what has been imported stays: no later collection looks through it
    footprint = Footprint(device)
    channel.send(Warm(process_bytes=footprint.process_bytes).to_header())
    inbox = _Inbox(channel, footprint)
    load = to_replica(inbox.next().header)
    if not isinstance(load, Load):
        return
    start_s = time.perf_counter()
    try:
        model = _ready(load, device, tuple(config.get("factories", ())))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a model is somebody else's code
        _give_up(channel, error)
    rows = min(load.max_rows, model.most_rows or load.max_rows)
    hello = Hello(
        model=load.model,
        version=load.version,
        replica=channel.name,
        signature=model.signature,
        max_rows=rows,
        load_s=time.perf_counter() - start_s,
        model_bytes=footprint.model_bytes(),
    )
    channel.send(hello.to_header())
    channel.send(Credit(n=CREDITS).to_header())
    _serve(channel, model, limit_bytes, inbox)


class _Inbox:
    """What the gateway says; while it is read, the gateway is told that this process is there."""

    def __init__(self, channel: Channel, footprint: Footprint) -> None:
        self._channel = channel
        self._footprint = footprint
        self._told_s = time.monotonic()

    def next(self) -> Message:
        while True:
            # Also between batches that follow each other: what the model takes may have grown.
            if time.monotonic() - self._told_s >= BEAT_S:
                self._tell()
            message = self._channel.receive(timeout_s=BEAT_S)
            if message is not None:
                return message
            self._tell()

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        self._channel.send(Beat(model_bytes=self._footprint.model_bytes()).to_header())


def _serve(channel: Channel, model: LoadedModel, limit_bytes: int, inbox: _Inbox) -> None:
    while True:
        message = inbox.next()
        asked = to_replica(message.header)
        match asked:
            case Run():
                failed = _answer(channel, model, asked, message)
                if failed == "memory" and _is_full(limit_bytes):
                    raise SystemExit("the model holds almost all of the memory it may have")
            case Drain():
                return
            case Load():
                raise ValueError(f"this is a replica already, and cannot become one of {asked.model}")


def _answer(channel: Channel, model: LoadedModel, run: Run, message: Message) -> FailureKind | None:
    """Run a batch and say how it went; what it failed of, if it did."""
    try:
        inputs = unpack(run.inputs, message.frames)
        conform(inputs, model.signature.inputs, "input")
    except (Misfit, ValueError) as error:
        return _fail(channel, run.batch, "input", error)
    start_s = time.perf_counter()
    try:
        outputs = run_rows(model, inputs)
        seconds = time.perf_counter() - start_s
        tensors, frames = pack(outputs)
    except Misfit as error:
        return _fail(channel, run.batch, "output", error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a model is somebody else's code
        return _fail(channel, run.batch, "memory" if _is_out_of_memory(error) else "model", error)
    channel.send(Result(batch=run.batch, seconds=seconds, outputs=tensors).to_header(), frames)
    return None


def run_rows(model: LoadedModel, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Run a batch, filled up to the rows that the model needs at least; outputs have the batch's rows.

    Raises:
        Misfit: what the model returned does not fit its signature.
    """
    rows = rows_of(inputs)
    missing = model.least_rows - rows
    if missing > 0:
        # The last row once more: a value that the model knows, where zeros might not be.
        inputs = {name: np.concatenate([x, x[-1:].repeat(missing, axis=0)]) for name, x in inputs.items()}
    outputs = dict(model.run(inputs))
    conform(outputs, model.signature.outputs, "output", rows=max(rows, model.least_rows))
    return {name: x[:rows] for name, x in outputs.items()} if missing > 0 else outputs


def _ready(load: Load, device: Device, factories: tuple[str, ...]) -> LoadedModel:
    """Load the model and run it once, so that the first request does not pay for what happens but once."""
    order = Order(
        path=Path(load.path),
        options=load.options,
        signature=load.signature,
        trust=load.trust,
        factories=factories,
    )
    model = format_named(load.format).load(order, device)
    zeros = {
        spec.name: np.zeros(
            (1, *(length or _UNNAMED_ROWS for length in spec.shape[1:])), dtype=DTYPES[spec.datatype]
        )
        for spec in model.signature.inputs
    }
    run_rows(model, zeros)
    return model


def _give_up(channel: Channel, error: BaseException) -> NoReturn:
    traceback.print_exc()
    line = _line(error)
    failure: FailureKind = "memory" if _is_out_of_memory(error) else "load"
    channel.send(Failed(error=line, failure=failure).to_header())
    raise SystemExit(line) from error


def _fail(channel: Channel, batch: int, failure: FailureKind, error: BaseException) -> FailureKind:
    if failure == "model":
        traceback.print_exception(error, file=sys.stderr)
    channel.send(Failed(batch=batch, error=_line(error), failure=failure).to_header())
    return failure


def _line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")[:500]
    return text if isinstance(error, ForescaleError | Misfit) else f"{type(error).__name__}: {text}"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        # Neither torch on CPUs nor onnxruntime has an error of its own for it.
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _limit_memory(device: Device, limit_bytes: int) -> None:
    """Make allocations beyond the limit fail, so that a model's hunger is its own error and nobody else's."""
    if limit_bytes <= 0:
        return
    if device.kind is DeviceKind.CUDA:
        fraction = min(1.0, limit_bytes / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(fraction)
    elif sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def _is_full(limit_bytes: int) -> bool:
    gc.collect()
    return psutil.Process().memory_info().rss > _FULL_FRACTION * limit_bytes
