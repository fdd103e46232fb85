"""What gateway and replicas say to each other: headers of the channel (``engine/stream.py``).

```text
process                                        gateway
connected (engine/bootstrap.py), then Warm ──►          torch is imported, there is no model yet
Beat                                       ──►          about every second, between batches
                                           ◄── Drain    end

replica
                                           ◄── Load     hold this replica, beside those that there are
Hello, Credit(2)                           ──►          or Failed(batch=None): it is not held
                                           ◄── Run      + one frame per input; costs a credit
Result + one frame per output, or Failed   ──►          the batch is over: its credit is back
                                           ◄── Threads  run its batches with so many from now on
                                           ◄── Drain    finish what was sent, then give the replica up
Left                                       ──►          it is held no more
```

A process may hold several replicas, each with its own address ``PROCESS/NAME``: in headers, ``to`` and
``from`` are the replica's name, and ``link.py`` puts both together. Orders are carried out one at a time, as
they came, whoever they are for; a batch on a GPU may be started before the former is answered. Nothing is
said while a batch runs: a model that loops for ever is noticed as silence. Frames are what
``engine/serve/arrays.py`` packs and unpacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_args

from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature, signature_as_json, signature_from_json

FailureKind = Literal["load", "input", "model", "output", "memory", "crash", "timeout"]
"""What a failure is about: the model cannot be loaded; the inputs do not fit it; it raised; what it returned
does not fit its signature; it ran out of memory; its process died; it did not answer in time."""

Header = Mapping[str, Any]

_M = TypeVar("_M")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor whose values are in a frame."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class _Counts:
    """A message of counts alone, or of nothing but its kind."""

    __slots__ = ()
    kind: ClassVar[str]

    def to_header(self) -> Header:
        return {"type": self.kind, **{each.name: getattr(self, each.name) for each in _fields(self)}}

    @classmethod
    def from_header(cls, header: Header) -> Self:
        return cls(**{each.name: _count(header[each.name]) for each in _fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm(_Counts):
    """The process has imported torch and waits for a model.

    Attributes:
        process_bytes: memory that it takes until then; 0: not known.
        common_bytes: memory that it has together with all others.
    """

    process_bytes: int = 0
    common_bytes: int = 0

    kind: ClassVar[str] = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Hold one more replica, of a model.

    Attributes:
        model, version: as requests name them.
        format: a name of ``engine/serve/formats``.
        path: the artifact on this machine, its hash verified.
        options: the format's own, JSON-able.
        signature: what the model was registered with; None: what its artifact says.
        max_rows: most rows of a batch.
        trust: whether code in the artifact may run.
        threads: that run a batch; None: as many as the device has cores.
    """

    model: str
    version: str
    format: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    signature: Signature | None = None
    max_rows: int = 32
    trust: bool = False
    threads: int | None = None

    kind: ClassVar[str] = "load"

    def to_header(self) -> Header:
        return {
            "type": self.kind,
            "model": self.model,
            "version": self.version,
            "format": self.format,
            "path": self.path,
            "options": dict(self.options),
            "signature": self.signature and signature_as_json(self.signature),
            "max_rows": self.max_rows,
            "trust": self.trust,
            "threads": self.threads,
        }

    @classmethod
    def from_header(cls, header: Header) -> Load:
        signature = header["signature"]
        return cls(
            model=_text(header["model"]),
            version=_text(header["version"]),
            format=_text(header["format"]),
            path=_text(header["path"]),
            options=_mapping(header["options"]),
            signature=signature and signature_from_json(signature),
            max_rows=_count(header["max_rows"]),
            trust=header["trust"] is True,
            threads=None if header["threads"] is None else _count(header["threads"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The model is loaded and warmed up; ``replica`` is the address that it is reached by.

    Attributes:
        max_rows: most rows it takes in a batch.
        load_s: from the order to this message.
        model_bytes: most memory that the model has taken at any time; 0: not known.
    """

    model: str
    version: str
    replica: str
    signature: Signature
    max_rows: int
    load_s: float = 0.0
    model_bytes: int = 0

    kind: ClassVar[str] = "hello"

    def to_header(self) -> Header:
        return {
            "type": self.kind,
            "model": self.model,
            "version": self.version,
            "replica": self.replica,
            "signature": signature_as_json(self.signature),
            "max_rows": self.max_rows,
            "load_s": self.load_s,
            "model_bytes": self.model_bytes,
        }

    @classmethod
    def from_header(cls, header: Header) -> Hello:
        return cls(
            model=_text(header["model"]),
            version=_text(header["version"]),
            replica=_text(header["replica"]),
            signature=signature_from_json(header["signature"]),
            max_rows=_count(header["max_rows"]),
            load_s=float(header["load_s"]),
            model_bytes=_count(header["model_bytes"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit(_Counts):
    """Room for so many batches more; ``Result`` and ``Failed`` give a batch's own credit back unsaid."""

    n: int

    kind: ClassVar[str] = "credit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Run a batch; one frame per input follows the header."""

    batch: int
    inputs: tuple[Tensor, ...]

    kind: ClassVar[str] = "run"

    def to_header(self) -> Header:
        return {"type": self.kind, "batch": self.batch, "inputs": _tensor_fields(self.inputs)}

    @classmethod
    def from_header(cls, header: Header) -> Run:
        return cls(batch=_count(header["batch"]), inputs=_tensors(header["inputs"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A batch's outputs; one frame per output follows the header.

    Attributes:
        seconds: what the model itself took.
        threads: that ran it.
    """

    batch: int
    seconds: float
    outputs: tuple[Tensor, ...]
    threads: int = 1

    kind: ClassVar[str] = "result"

    def to_header(self) -> Header:
        return {
            "type": self.kind,
            "batch": self.batch,
            "seconds": self.seconds,
            "outputs": _tensor_fields(self.outputs),
            "threads": self.threads,
        }

    @classmethod
    def from_header(cls, header: Header) -> Result:
        return cls(
            batch=_count(header["batch"]),
            seconds=float(header["seconds"]),
            outputs=_tensors(header["outputs"]),
            threads=_count(header["threads"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Something went wrong.

    Attributes:
        error: one line for people.
        failure: what it is about.
        batch: the batch that failed; None: the replica did, or all in the process if it is not said which.
    """

    error: str
    failure: FailureKind
    batch: int | None = None

    kind: ClassVar[str] = "failed"

    def to_header(self) -> Header:
        return {"type": self.kind, "batch": self.batch, "error": self.error, "kind": self.failure}

    @classmethod
    def from_header(cls, header: Header) -> Failed:
        # ``engine/bootstrap.py`` says "failed" as well, with an error alone, when the process's entry raised.
        batch = header.get("batch")
        failure = header.get("kind", "crash")
        if failure not in get_args(FailureKind):
            raise ValueError(f"{failure!r} is no kind of failure")
        return cls(
            error=_text(header["error"]), failure=failure, batch=None if batch is None else _count(batch)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The process is there; ``model_bytes`` as in ``Hello``, of each replica by its name."""

    model_bytes: Mapping[str, int] = field(default_factory=dict[str, int])

    kind: ClassVar[str] = "beat"

    def to_header(self) -> Header:
        return {"type": self.kind, "model_bytes": dict(self.model_bytes)}

    @classmethod
    def from_header(cls, header: Header) -> Beat:
        return cls(
            model_bytes={
                _text(name): _count(taken) for name, taken in _mapping(header["model_bytes"]).items()
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(_Counts):
    """Finish the batches that were sent before this, then give the replica up."""

    kind: ClassVar[str] = "drain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads(_Counts):
    """Run batches with so many threads from now on; a format that cannot change them goes on as it is."""

    threads: int

    kind: ClassVar[str] = "threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(_Counts):
    """The replica is held no more."""

    kind: ClassVar[str] = "left"


FromReplica = Warm | Hello | Credit | Result | Failed | Beat | Left
ToReplica = Load | Run | Threads | Drain

_FROM_REPLICA: Mapping[str, type[FromReplica]] = {
    kind.kind: kind for kind in (Warm, Hello, Credit, Result, Failed, Beat, Left)
}
_TO_REPLICA: Mapping[str, type[ToReplica]] = {kind.kind: kind for kind in (Load, Run, Threads, Drain)}


def address(process: str, replica: str) -> str:
    """How a replica is reached."""
    return f"{process}/{replica}"


def from_replica(header: Header) -> FromReplica | None:
    """What a replica said; None for the bootstrap's ``connected``.

    Raises:
        ValueError: the header makes no sense.
    """
    if header.get("type") == "connected":
        return None
    return _read(_FROM_REPLICA, header)


def to_replica(header: Header) -> ToReplica:
    """What a replica is asked for.

    Raises:
        ValueError: the header makes no sense.
    """
    return _read(_TO_REPLICA, header)


def _read(kinds: Mapping[str, type[_M]], header: Header) -> _M:
    try:
        return cast(Any, kinds[header["type"]]).from_header(header)
    except (KeyError, TypeError, ValueError, InvalidInput) as error:
        raise ValueError(f"{header.get('type')!r}: {type(error).__name__}: {error}") from error


def _tensor_fields(tensors: tuple[Tensor, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    # Positions instead of names: a header is packed and read for every batch.
    return [(tensor.name, tensor.datatype, tensor.shape) for tensor in tensors]


def _tensors(fields: Any) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name=_text(name), datatype=_text(datatype), shape=tuple(map(_count, shape)))
        for name, datatype, shape in fields
    )


def _fields(message: Any) -> tuple[Field[Any], ...]:
    return fields(message)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no mapping")
    return cast(dict[str, Any], value)
