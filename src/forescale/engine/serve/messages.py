"""What gateway and replicas say to each other: headers of the channel (``engine/channel.py``).

```text
replica                                        gateway
connected (engine/bootstrap.py), then Warm ──►          torch is imported, there is no model yet
                                           ◄── Load     become a replica of this model
Hello, Credit(2)                           ──►          or Failed(batch=None), and the process ends
                                           ◄── Run      + one frame per input; costs a credit
Result + one frame per output, or Failed   ──►          the batch is over: its credit is back
Beat                                       ──►          about every second, between batches
                                           ◄── Drain    finish what was sent, then end
```

A replica runs one batch at a time, in the order they came. It says nothing while a batch runs: a model that
loops for ever is noticed as silence. Frames are what ``engine/serve/arrays.py`` packs and unpacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """The process has imported torch and waits for a model.

    Attributes:
        process_bytes: memory that it takes until then; 0: not known.
    """

    process_bytes: int = 0

    kind: ClassVar[str] = "warm"

    def to_header(self) -> Header:
        return {"type": self.kind, "process_bytes": self.process_bytes}

    @classmethod
    def from_header(cls, header: Header) -> Warm:
        return cls(process_bytes=_count(header["process_bytes"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Become a replica of a model.

    Attributes:
        model, version: as requests name them.
        format: a name of ``engine/serve/formats``.
        path: the artifact on this machine, its hash verified.
        options: the format's own, JSON-able.
        signature: what the model was registered with; None: what its artifact says.
        max_rows: most rows of a batch.
        trust: whether code in the artifact may run.
    """

    model: str
    version: str
    format: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    signature: Signature | None = None
    max_rows: int = 32
    trust: bool = False

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
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The model is loaded and warmed up; ``replica`` is the process's address on the channel.

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
class Credit:
    """Room for so many batches more; ``Result`` and ``Failed`` give a batch's own credit back unsaid."""

    n: int

    kind: ClassVar[str] = "credit"

    def to_header(self) -> Header:
        return {"type": self.kind, "n": self.n}

    @classmethod
    def from_header(cls, header: Header) -> Credit:
        return cls(n=_count(header["n"]))


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
    """

    batch: int
    seconds: float
    outputs: tuple[Tensor, ...]

    kind: ClassVar[str] = "result"

    def to_header(self) -> Header:
        return {
            "type": self.kind,
            "batch": self.batch,
            "seconds": self.seconds,
            "outputs": _tensor_fields(self.outputs),
        }

    @classmethod
    def from_header(cls, header: Header) -> Result:
        return cls(
            batch=_count(header["batch"]),
            seconds=float(header["seconds"]),
            outputs=_tensors(header["outputs"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Something went wrong.

    Attributes:
        error: one line for people.
        failure: what it is about.
        batch: the batch that failed; None: the replica did, and its process ends.
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
    """The process is there; ``model_bytes`` as in ``Hello``."""

    model_bytes: int = 0

    kind: ClassVar[str] = "beat"

    def to_header(self) -> Header:
        return {"type": self.kind, "model_bytes": self.model_bytes}

    @classmethod
    def from_header(cls, header: Header) -> Beat:
        return cls(model_bytes=_count(header["model_bytes"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Finish the batches that were sent before this, then end."""

    kind: ClassVar[str] = "drain"

    def to_header(self) -> Header:
        return {"type": self.kind}

    @classmethod
    def from_header(cls, _header: Header) -> Drain:
        return cls()


FromReplica = Warm | Hello | Credit | Result | Failed | Beat
ToReplica = Load | Run | Drain

_FROM_REPLICA: Mapping[str, type[FromReplica]] = {
    kind.kind: kind for kind in (Warm, Hello, Credit, Result, Failed, Beat)
}
_TO_REPLICA: Mapping[str, type[ToReplica]] = {kind.kind: kind for kind in (Load, Run, Drain)}


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
