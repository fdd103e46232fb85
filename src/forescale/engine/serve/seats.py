"""What a crew's processes run, and what it knows of them and of the replicas that they hold."""

from __future__ import annotations

from forescale.engine.backend import ProcessHandle
from forescale.engine.serve.messages import Failed, Load
from forescale.engine.serve.roster import Replica, State

ENTRY = "forescale.engine.serve.replica:main"
PRELOAD = (
    "forescale.engine.serve.replica",
    # What torch imports when it first deserializes and runs an exported program: 3 s.
    "torch.export.pt2_archive._package",
    "torch._export.serde.serialize",
    "torch.export._trace",
    "torch.export.passes",
    "torch._inductor.sizevars",
    "sympy.tensor.tensor",
)


class Process:
    """A living process.

    Attributes:
        heard_s: when it last said something.
        warm: whether it could hold a replica.
        house: whose replicas it holds; None: it is a spare.
        is_ending: it has held replicas, and holds none any more.
        failed: what it said was wrong with itself.
        fallen: the replica of which it has said that it ends all.
        killed_for: what it was killed for.
    """

    def __init__(self, handle: ProcessHandle, device: str, heard_s: float) -> None:
        self.handle = handle
        self.device = device
        self.heard_s = heard_s
        self.warm = False
        self.house: str | None = None
        self.seats: dict[str, Seat] = {}
        self.is_ending = False
        self.failed: Failed | None = None
        self.fallen: str | None = None
        self.killed_for: Failed | None = None

    @property
    def is_open(self) -> bool:
        return self.warm and not self.is_ending and not self.killed_for


class Seat:
    """A wanted replica.

    Attributes:
        since_s: when it came into its state.
        began_s: when it was given its process.
    """

    def __init__(self, name: str, load: Load, device: str, house: str, since_s: float) -> None:
        self.name = name
        self.load = load
        self.device = device
        self.house = house
        self.since_s = since_s
        self.began_s = 0.0
        self.state = State.WAITING
        self.process: Process | None = None
        self.cause: str | None = None
        self.attempts = 0
        self.retry_s = 0.0
        self.leaving = False

    @property
    def version(self) -> tuple[str, str]:
        return self.load.model, self.load.version

    def as_replica(self) -> Replica:
        return Replica(
            name=self.name,
            model=self.load.model,
            version=self.load.version,
            device=self.device,
            house=self.house,
            state=self.state,
            process=self.process and self.process.handle.name,
            threads=self.load.threads,
            cause=self.cause,
            attempts=self.attempts,
            retry_s=self.retry_s,
        )
