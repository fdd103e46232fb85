"""What the controller asks of the data plane, and what the data plane tells of itself.

One exchange at a time: the controller sends commands, the data plane carries them out and answers with a
whole ``PlaneState``. So every decision is made on what was true after the commands before it. Commands that
make no sense any more (a replica that is gone, a version that is served already) are passed over: the state
says what is so.

Versions are named by text, as in requests and on the channel to replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forescale.engine.serve.messages import Load
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.roster import Replica
from forescale.engine.serve.routing import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Take requests to a version; they wait for its first replica.

    Attributes:
        load: what its replicas are to load. Its signature is not None: requests are checked against it.
    """

    load: Load
    policy: QueuePolicy = field(default_factory=QueuePolicy)
    kind: Literal["serve"] = "serve"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Add a replica of a served version; if its process is lost it gets another one, unasked.

    Attributes:
        house: those of one house on a device share a process; None: it gets one of its own.
    """

    model: str
    version: str
    device: str
    house: str | None = None
    kind: Literal["start_replica"] = "start_replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """Let a replica finish what it has, and end it."""

    name: str
    kind: Literal["stop_replica"] = "stop_replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steer:
    """Queue the requests to a served version in another way from now on."""

    model: str
    version: str
    policy: QueuePolicy
    kind: Literal["steer"] = "steer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetThreads:
    """Run the batches of a served version with so many threads from now on.

    Attributes:
        threads: of each replica, if its device has the cores; None: as many as that has.
    """

    model: str
    version: str
    threads: int | None
    kind: Literal["set_threads"] = "set_threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRoute:
    """Decide which version answers requests that name none; all that the route names are served."""

    model: str
    route: Route
    kind: Literal["set_route"] = "set_route"


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Take no more requests to a version, answer those that came, then stop its replicas."""

    model: str
    version: str
    kind: Literal["withdraw"] = "withdraw"


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Take no more requests at all, answer those that came, end all replicas, then the process."""

    kind: Literal["end"] = "end"


Command = Serve | StartReplica | StopReplica | Steer | SetThreads | SetRoute | Withdraw | End


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """A served version; counts go from when it was first served.

    Attributes:
        is_ready: whether it has a replica that takes requests.
        outcomes: requests by how they ended, as in ``metrics.ModelMetrics``.
        latency: requests answered, by the bounds ``metrics.SECONDS``, and a last count of those above.
        arrived_rows: of all requests that fit the model, whatever became of them.
        waiting_rows: rows of the requests in the queue, of which there are ``waiting``.
        in_flight: requests that replicas have.
        batch_times: mean rows and seconds of the latest batches, by threads; by size, ascending.
        busy_core_s: that cores were busy with batches.
        max_rows: most rows of a batch.
        policy: how its requests are queued.
        load_s: what a replica took to load it last; None: none has.
        model_bytes: most memory that it has taken in a replica; None: not known.
        threads: of each replica, if its device has the cores; None: as many as that has.
        is_resizable: whether they can be changed while it runs.
        may_share: whether its replicas may be in processes with others; not if it has ended one.
    """

    model: str
    version: str
    is_ready: bool
    outcomes: Mapping[str, int]
    latency: tuple[int, ...]
    arrived_rows: int
    waiting_rows: int
    waiting: int
    in_flight: int
    batch_times: Mapping[int, tuple[tuple[float, float], ...]]
    max_rows: int
    policy: QueuePolicy = field(default_factory=QueuePolicy)
    busy_core_s: float = 0.0
    load_s: float | None = None
    model_bytes: int | None = None
    threads: int | None = None
    is_resizable: bool = True
    may_share: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """Something to be written down, told again until it is acknowledged.

    Attributes:
        number: from 1 on, without gaps.
        at_s: seconds since the Unix epoch.
        kind: ``replica_ready``, ``replica_lost`` or ``replica_ended``.
        detail: JSON-able.
    """

    number: int
    at_s: float
    kind: str
    model: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneState:
    """All there is.

    Attributes:
        plane: names this data plane; another one, also in its place, is named otherwise.
        devices: names of those that can have replicas.
        replicas: in the order in which they were started.
        spares: processes that could take a model at once.
        warm_up_s: what the last process took to become a spare.
        process_bytes: memory that a replica's process takes before it has a model.
        room_bytes: memory that replicas may take together on each device; nothing: not known.
        cores: that the replicas of a CPU device share; of others nothing is said.
        versions: those that take requests.
        routes: of each model that has such a version.
        withdrawn: versions, as model and version, that take none any more and answer their last ones.
        happenings: those not acknowledged.
    """

    plane: str
    devices: tuple[str, ...]
    replicas: tuple[Replica, ...] = ()
    spares: int = 0
    warm_up_s: float = 0.0
    process_bytes: int = 0
    room_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    cores: Mapping[str, int] = field(default_factory=dict[str, int])
    versions: tuple[VersionState, ...] = ()
    routes: Mapping[str, Route] = field(default_factory=dict[str, Route])
    withdrawn: tuple[tuple[str, str], ...] = ()
    happenings: tuple[Happened, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request of the controller.

    Attributes:
        acknowledged: number of the last happening that is written down.
        wait_s: the answer comes at once if something has changed since the last one, and else when it
            does, but at the latest after so long.
        lease_s: without a controller for so long, the data plane ends.
    """

    commands: tuple[Command, ...] = ()
    acknowledged: int = 0
    wait_s: float = 0.0
    lease_s: float = 300.0
