"""Model formats: how each is looked at, and loaded in a replica.

A format is a module here with the two functions of ``Format``. Only a replica calls ``load``; ``inspect`` of
some needs their library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from forescale.core.cluster import Device
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature
from forescale.engine.serve.arrays import Array

_MODULES = {
    name: f"forescale.engine.serve.formats.{name}" for name in ("pt2", "onnx", "safetensors", "factory")
}
FORMATS = tuple(_MODULES)
FIXED_THREADS = frozenset({"onnx"})
"""Formats whose replicas keep the threads that they were loaded with."""
_ENDINGS = {".pt2": "pt2", ".onnx": "onnx", ".safetensors": "safetensors"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A model to load.

    Attributes:
        path: its artifact.
        options: the format's own.
        signature: what it was registered with; None: what the artifact says.
        trust: whether code in the artifact may run.
        factories: names that the format ``factory`` may import and call.
        threads: that run a batch; None: as many as the device has cores.
    """

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    signature: Signature | None = None
    trust: bool = False
    factories: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that is over.

    Attributes:
        outputs: by name.
        seconds: that a batch takes when one follows the other.
    """

    outputs: Mapping[str, Array]
    seconds: float

    def is_over(self) -> bool:
        return True

    def wait(self) -> Done:
        return self


class Underway(Protocol):
    """A batch that a device was given; ``Done`` is one that is over from the beginning."""

    def is_over(self) -> bool:
        """Whether ``wait`` would not wait."""
        ...

    def wait(self) -> Done:
        """Its outputs, when they are there.

        Raises:
            Exception: whatever the model raised while nobody was waiting.
        """
        ...


Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Runner = Callable[[Mapping[str, Array]], Underway]


def at_once(function: Function) -> Runner:
    """A runner whose batches are over when it returns."""

    def run(inputs: Mapping[str, Array]) -> Done:
        start_s = time.perf_counter()
        outputs = function(inputs)
        return Done(outputs, time.perf_counter() - start_s)

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that can be run.

    Attributes:
        run: starts a batch with inputs by name, and needs them no more when it returns. All have equally many
            rows, between the two limits, and so have the outputs.
        least_rows, most_rows: of a batch (None: any number).
        threads: that run a batch, whatever torch's number is; None: as many as that.
    """

    signature: Signature
    run: Runner
    least_rows: int = 1
    most_rows: int | None = None
    threads: int | None = None


class Format(Protocol):
    def inspect(self, order: Order) -> Signature:
        """What the model takes and gives, without running it.

        Raises:
            InvalidInput: the artifact is not of this format, or needs what the order does not give.
        """
        ...

    def load(self, order: Order, device: Device) -> LoadedModel:
        """Make the model ready to run on this process's device.

        Raises:
            InvalidInput: as above, or the artifact and the signature contradict each other.
        """
        ...


def format_named(name: str) -> Format:
    """A format by name.

    Raises:
        InvalidInput: there is none of that name.
    """
    if name not in _MODULES:
        raise InvalidInput(f"{name!r} is no model format; there are {', '.join(FORMATS)}")
    return cast(Format, import_module(_MODULES[name]))


def format_of(path: Path) -> str:
    """The format that a file's name ends in.

    Raises:
        InvalidInput: none does.
    """
    try:
        return _ENDINGS[path.suffix]
    except KeyError as error:
        raise InvalidInput(
            f"{path.name} ends in none of {', '.join(_ENDINGS)}: name its format, one of {', '.join(FORMATS)}"
        ) from error


def declared_signature(order: Order) -> Signature:
    """The signature that a model was registered with.

    Raises:
        InvalidInput: there is none.
    """
    if order.signature is None:
        raise InvalidInput("this format does not say what the model takes and gives: add it with a signature")
    return order.signature


def refuse_other_names(declared: Signature, found: Signature) -> None:
    """Compare what a model was registered with, and what its artifact says.

    Raises:
        InvalidInput: names or data types differ.
    """
    for side in ("inputs", "outputs"):
        ours, theirs = (
            {spec.name: spec.datatype for spec in getattr(signature, side)} for signature in (declared, found)
        )
        if ours != theirs:
            raise InvalidInput(f"the model was registered with {side} {ours}, but has {theirs}")
