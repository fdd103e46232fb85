"""What a crew goes by, what it says about its replicas, and what happens to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from forescale.engine.serve.messages import FailureKind, Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class CrewRules:
    """How patient a crew is.

    Attributes:
        spares: warm processes without a model, per device.
        starts: processes that may start at the same time; more slow each other down.
        load_limit_s: a process that takes longer to start, or to load its model, is replaced.
        silence_limit_s: so is one that says nothing for so long: a batch that takes longer has failed.
        drain_limit_s: a draining one is killed after it.
        backoff_s: least time from one attempt to the next, from the second in a row on; doubles with each to
            ``backoff_limit_s``.
            Processes that end before they are warm are counted alike, together.
        steady_s: a replica that has served so long begins anew with its attempts: pauses are for those that
            cannot serve, not for those that somebody kills.
        memory_limit_bytes: of a process; 0: its device's memory.
        factories: names of Python functions that models of the format ``factory`` may be made by.
    """

    spares: int = 1
    starts: int = 1
    load_limit_s: float = 120.0
    silence_limit_s: float = 30.0
    drain_limit_s: float = 30.0
    backoff_s: float = 0.5
    backoff_limit_s: float = 30.0
    steady_s: float = 3.0
    memory_limit_bytes: int = 0
    factories: tuple[str, ...] = ()

    def pause_s(self, attempts: int) -> float:
        """From one attempt to the next, after so many."""
        if attempts < 2:
            return 0.0
        return min(self.backoff_limit_s, self.backoff_s * 2.0 ** min(attempts - 2, 60))


class State(StrEnum):
    """Of a replica."""

    WAITING = "waiting"  # for a process: one that starts, or the end of a pause
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One wanted replica, as it is now; it outlives its processes.

    Attributes:
        house: what it shares with the replicas that are to be in one process with it.
        process: the process that holds it, if one does.
        threads: that run a batch; None: as many as its device has cores.
        cause: what ended its last process, if one was lost.
        attempts: processes lost since it last served steadily.
        retry_s: when it gets its next process; 0: as soon as one is warm.
    """

    name: str
    model: str
    version: str
    device: str
    house: str
    state: State
    process: str | None
    threads: int | None
    cause: str | None
    attempts: int
    retry_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A replica serves from now on."""

    replica: str
    address: str
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A replica is held no more, and the batches it had are gone; it will get another process."""

    replica: str
    address: str
    cause: str
    failure: FailureKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A replica that was taken away has finished (or been lost, with the batches it still had)."""

    replica: str
    address: str


CrewEvent = Ready | Lost | Ended
