"""What the registry keeps, as values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TEXT_LIMIT = 200
LAST_PRIORITY = 1000
MOST_ROWS = 4096
"""Of a batch."""
MOST_THREADS = 1024

_LONGEST_WAIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A stored file, addressed by its content; ``sha256`` is 64 lower-case hexadecimal digits."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A version of a model. It never changes.

    Attributes:
        number: from 1 on, in the order in which versions were added.
        format: how the file is read, e.g. ``pt2`` or ``onnx``.
        options: what that format has to know besides the file.
        metrics: figures that its maker gave, e.g. ``{"accuracy": 0.97}``.
        created_at_s: seconds since the Unix epoch.
        commit: of the code that made it, where known.
    """

    model: str
    number: int
    artifact: Artifact
    format: str
    signature: Signature
    options: Mapping[str, Any]
    metrics: Mapping[str, float]
    created_at_s: float
    created_by: str
    commit: str | None

    @property
    def reference(self) -> str:
        """``NAME@NUMBER``."""
        return f"{self.model}@{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasChange:
    """An alias of a model was set to a version, or taken away (``number`` is None)."""

    model: str
    alias: str
    number: int | None
    at_s: float
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSpec:
    """Which version of a model is to be served, by how many replicas.

    Attributes:
        latency_s: in which requests are to be answered; None: nobody said.
        priority: class, from 1 (first) on, in which models get replicas when there is no room for all.
        max_batch: most rows of a request and of a batch; None: nobody said, as with those below.
        max_wait_s: how long a batch that is not full waits for more though a replica is free.
        timeout_s: after which requests that name no time are refused.
        queue: most requests that wait.
        max_threads: most threads of a replica on CPUs.

    Raises:
        InvalidInput: the numbers of replicas contradict each other, or a figure is out of range.
    """

    model: str
    number: int
    min_replicas: int = 1
    max_replicas: int = 1
    latency_s: float | None = None
    priority: int = 10
    max_batch: int | None = None
    max_wait_s: float | None = None
    timeout_s: float | None = None
    queue: int | None = None
    max_threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise InvalidInput(
                f"{self.model}: from {self.min_replicas} to {self.max_replicas} replicas is not possible; "
                "the least must be 0 or more, the most 1 or more and not below the least"
            )
        if self.latency_s is not None and not 0.0 < self.latency_s < math.inf:
            raise InvalidInput(f"{self.model}: a latency of {self.latency_s} s is not possible")
        if not 1 <= self.priority <= LAST_PRIORITY:
            raise InvalidInput(f"{self.model}: priorities go from 1 (first) to {LAST_PRIORITY}")
        if self.max_threads is not None and not 1 <= self.max_threads <= MOST_THREADS:
            raise InvalidInput(f"{self.model}: a replica has from 1 to {MOST_THREADS} threads")
        self._check_queue()

    def _check_queue(self) -> None:
        if self.max_batch is not None and not 1 <= self.max_batch <= MOST_ROWS:
            raise InvalidInput(f"{self.model}: batches have from 1 to {MOST_ROWS} rows, not {self.max_batch}")
        if self.max_wait_s is not None and not 0.0 <= self.max_wait_s <= _LONGEST_WAIT_S:
            raise InvalidInput(f"{self.model}: a batch waits from 0 to {_LONGEST_WAIT_S:g} s")
        if self.timeout_s is not None and not 0.0 < self.timeout_s < math.inf:
            raise InvalidInput(f"{self.model}: a timeout of {self.timeout_s} s is not possible")
        if self.queue is not None and self.queue < 1:
            raise InvalidInput(f"{self.model}: a queue holds 1 request or more, not {self.queue}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A deployment as somebody asked for it.

    Attributes:
        previous: number of the version that it replaced; None: it was the first.
    """

    spec: DeploymentSpec
    deployed_at_s: float
    deployed_by: str
    previous: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something to be written down, e.g. ``replica_lost`` of ``digits``.

    Attributes:
        subject: the model it is about, or "".
        by: a person, or ``forescale``.
        detail: JSON-able.
    """

    kind: str
    subject: str
    by: str
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened; numbers grow with time and may have gaps."""

    number: int
    at_s: float
    happening: Happening


def check_name(name: str, what: str) -> None:
    """Whether ``name`` can name a model or alias: it appears in URLs, process names and file names.

    Raises:
        InvalidInput: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:80]!r} cannot name {what}: use up to 64 letters, digits and '_.-', "
            "a letter or digit first"
        )


def check_alias(alias: str) -> None:
    """Whether ``alias`` can stand where a version's number could, too.

    Raises:
        InvalidInput: it cannot.
    """
    check_name(alias, "an alias")
    if alias.isdecimal():
        raise InvalidInput(f"{alias!r} cannot name an alias: it would be taken for a version's number")


def check_text(text: str, what: str) -> None:
    """Whether ``text`` is a short printable line.

    Raises:
        InvalidInput: it is not.
    """
    if not text or len(text) > _TEXT_LIMIT or not text.isprintable():
        raise InvalidInput(f"{what} must be a line of 1 to {_TEXT_LIMIT} printable characters")


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Whether all metrics are finite numbers with names.

    Raises:
        InvalidInput: one is not.
    """
    for name, value in metrics.items():
        check_text(name, "a metric's name")
        if not math.isfinite(value):
            raise InvalidInput(f"metric {name} is {value}; only finite numbers can be kept")
