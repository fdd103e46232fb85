"""A replica's batches: how they are started, and what is answered."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forescale.core.errors import ForescaleError
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.conformity import Misfit, conform, rows_of
from forescale.engine.serve.formats import LoadedModel, Underway
from forescale.engine.serve.messages import FailureKind, Header, Result, Run
from forescale.engine.wire import Frame


class BatchFailed(Exception):
    """There are no outputs; ``error`` says in a line why."""

    def __init__(self, failure: FailureKind, error: BaseException) -> None:
        super().__init__(str(error))
        self.failure: FailureKind = failure
        self.error = line_of(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch that was started.

    Attributes:
        replica: whose it is.
        threads: that run it.
    """

    number: int
    replica: str
    model: LoadedModel
    rows: int
    threads: int
    underway: Underway

    def answer(self) -> tuple[Header, Sequence[Frame]]:
        """Its outputs, when they are there.

        Raises:
            BatchFailed: there are none.
        """
        try:
            done = self.underway.wait()
            tensors, frames = pack(_cut(self.model, self.rows, done.outputs))
        except (Exception, SystemExit) as error:
            raise _failed(error) from error
        result = Result(batch=self.number, seconds=done.seconds, outputs=tensors, threads=self.threads)
        return result.to_header(), frames


def start(replica: str, model: LoadedModel, run: Run, frames: Sequence[memoryview]) -> Batch:
    """Start what is asked.

    Raises:
        BatchFailed: it is over already, without outputs.
    """
    try:
        inputs = unpack(run.inputs, frames)
        conform(inputs, model.signature.inputs, "input")
    except (Misfit, ValueError) as error:
        raise BatchFailed("input", error) from error
    try:
        underway = model.run(_filled(model, inputs))
    except (Exception, SystemExit) as error:
        raise _failed(error) from error
    return Batch(
        number=run.batch,
        replica=replica,
        model=model,
        rows=rows_of(inputs),
        threads=model.threads or torch.get_num_threads(),
        underway=underway,
    )


def run_rows(model: LoadedModel, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Run a batch, filled up to the rows that the model needs at least; outputs have the batch's rows.

    Raises:
        Misfit: what the model returned does not fit its signature.
    """
    return _cut(model, rows_of(inputs), model.run(_filled(model, inputs)).wait().outputs)


def line_of(error: BaseException) -> str:
    """An error in a line, with its type unless its text is ours."""
    text = next(iter(str(error).splitlines()), "")[:500]
    return text if isinstance(error, ForescaleError | Misfit) else f"{type(error).__name__}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what was missing."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        # Neither torch on CPUs or for pinned memory nor onnxruntime has an error of its own for it.
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("allocate memory", "CUDA error: out of memory"))
    )


def _failed(error: BaseException) -> BatchFailed:
    if isinstance(error, Misfit):
        return BatchFailed("output", error)
    if is_out_of_memory(error):
        return BatchFailed("memory", error)
    traceback.print_exception(error, file=sys.stderr)
    return BatchFailed("model", error)


def _filled(model: LoadedModel, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    missing = model.least_rows - rows_of(inputs)
    if missing <= 0:
        return inputs
    # The last row once more: a value that the model knows, where zeros might not be.
    return {name: np.concatenate([x, x[-1:].repeat(missing, axis=0)]) for name, x in inputs.items()}


def _cut(model: LoadedModel, rows: int, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
    outputs = dict(outputs)
    conform(outputs, model.signature.outputs, "output", rows=max(rows, model.least_rows))
    return {name: x[:rows] for name, x in outputs.items()} if rows < model.least_rows else outputs
