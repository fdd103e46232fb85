"""One request to a served model, and its answer, as values."""

from __future__ import annotations

from dataclasses import dataclass

from forescale.engine.serve.arrays import Array
from forescale.engine.serve.journey import Journey


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedOutput:
    """An output that the client asked for, and whether as raw bytes."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """What a client asks of a model; it fits the model's signature.

    Attributes:
        id: the client's own name for it; None: it gave none.
        inputs: in the signature's order, each with ``rows`` along its first axis.
        free_lengths: lengths of the axes, other than rows, that the signature leaves open. Only
            requests of the same ones can share a batch.
        outputs: in the order they are wanted.
        priority: class, from 1 (first) on; 0: the model's own.
        timeout_s: seconds from its arrival in which an answer is of use; None: the model's own.
        is_copy: of a request that another version answers; it is no demand.
        journey: to be filled in on the way; None: nobody traces it.
    """

    id: str | None
    inputs: tuple[Array, ...]
    rows: int
    size_bytes: int
    free_lengths: tuple[int, ...]
    outputs: tuple[WantedOutput, ...]
    priority: int = 0
    timeout_s: float | None = None
    is_copy: bool = False
    journey: Journey | None = None
