"""Batches seen before they run: a bounded look-ahead over any iterable, and what is in the batches.

Binding: the values of the graph's symbols for one batch, e.g. ``{"s0": 32, "s1": 256}``.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from forescale.core.errors import InvalidInput, TaskFailed

if TYPE_CHECKING:
    from torch import Tensor
Binding = Mapping[str, int]
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ended the source early; raised when the consumer gets to that place."""

    error: TaskFailed


class _Shelf(Generic[Batch]):
    """What the reading thread and the consumer share; the thread holds no reference to `LookAhead`."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.changed = threading.Condition()
        self.batches: deque[tuple[Batch, Binding]] = deque()
        self.failure: _Failure | None = None
        self.ended = False
        self.stopped = False

    def put(self, batch: Batch, binding: Binding) -> None:
        with self.changed:
            self.batches.append((batch, binding))
            self.changed.notify_all()

    def wait_for_room(self) -> bool:
        """True when there is room for one more, False when nobody wants any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.batches) < self.depth)
            return not self.stopped

    def end(self, failure: _Failure | None) -> None:
        with self.changed:
            self.failure = failure
            self.ended = True
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.batches.clear()
            self.changed.notify_all()


def _place(error: BaseException) -> str:
    """``file:line`` of the innermost frame of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"


def _read(
    batches: Iterable[Batch], describe: Callable[[Batch], Binding], first: int, shelf: _Shelf[Batch]
) -> None:
    number = first
    failure: _Failure | None = None
    try:
        iterator = iter(batches)
        while shelf.wait_for_room():
            try:
                batch = next(iterator)
            except StopIteration:
                break
            shelf.put(batch, describe(batch))
            number += 1
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
        reason = str(error) if isinstance(error, InvalidInput) else f"{type(error).__name__}: {error}"
        failed = TaskFailed(f"batch {number} could not be read: {reason} (at {_place(error)})")
        failed.__cause__ = error
        failure = _Failure(failed)
    shelf.end(failure)


class LookAhead(Generic[Batch]):
    """Iterates over ``(batch, binding)`` while a background thread reads up to ``depth`` batches ahead.

    Batches come in the source's order. When the source (or ``describe``) raises, the batches before it
    are still delivered, then ``TaskFailed`` names the batch and the source line, with the original error
    as its cause. The source may be infinite. The thread ends when the source ends, on ``close``, on leaving
    the ``with`` block, or when the object is garbage; a source that is blocked in its own ``next`` at that
    time is not interrupted and ends after it.

    Args:
        batches: any iterable, e.g. a list, a generator or a ``DataLoader``. Its iterator is used
            in the background thread only.
        depth: greatest number of batches held, >= 1.
        describe: batch -> binding, e.g. through ``graph.bind``; runs in the background thread.
        first: the number of the first batch, used in error messages.
    """

    def __init__(
        self, batches: Iterable[Batch], depth: int, describe: Callable[[Batch], Binding], *, first: int = 0
    ) -> None:
        if depth < 1:
            raise InvalidInput(f"look-ahead depth is {depth}, it must be at least 1")
        self._shelf: _Shelf[Batch] = _Shelf(depth)
        self._thread = threading.Thread(
            target=_read,
            args=(batches, describe, first, self._shelf),
            name="forescale-look-ahead",
            daemon=True,
        )
        weakref.finalize(self, self._shelf.stop)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, Binding]]:
        return self

    def __next__(self) -> tuple[Batch, Binding]:
        shelf = self._shelf
        with shelf.changed:
            shelf.changed.wait_for(lambda: shelf.batches or shelf.ended or shelf.stopped)
            if shelf.batches:
                item = shelf.batches.popleft()
                shelf.changed.notify_all()
                return item
            failure, shelf.failure = shelf.failure, None
        if failure is not None:
            raise failure.error
        raise StopIteration

    def upcoming(self, at_least: int = 0) -> tuple[Binding, ...]:
        """Bindings of the batches that were read and not yet delivered, next one first.

        Args:
            at_least: wait until that many are known (at most ``depth``) or the source has ended.
        """
        shelf = self._shelf
        wanted = min(at_least, shelf.depth)
        with shelf.changed:
            shelf.changed.wait_for(lambda: len(shelf.batches) >= wanted or shelf.ended or shelf.stopped)
            return tuple(binding for _, binding in shelf.batches)

    def close(self) -> None:
        """Stop reading, drop what was read ahead and wait for the thread; may be called twice."""
        self._shelf.stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatistics:
    """One part of the batches: its dtype and the smallest and largest size of every axis."""

    name: str
    dtype: str
    smallest: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatistics:
    """What a look at some batches found.

    Attributes:
        batches: how many were looked at.
        rows: size of axis 0 of the first part, summed.
        tokens: elements of the first part (or of the mask's part, where there is one), summed.
        padded_fraction: tokens that are padding / tokens; None when padding cannot be told.
        size_bytes: bytes of all parts, summed.
    """

    batches: int
    rows: int
    tokens: int
    padded_fraction: float | None
    size_bytes: int
    parts: tuple[PartStatistics, ...]


def tensor_parts(batch: Any) -> Mapping[str, Tensor]:
    """The tensors of a batch by name: keys of a dict, positions (``"0"``, ``"1"``) of a tuple or list."""
    if isinstance(batch, Mapping):
        named: Iterable[tuple[Any, Any]] = batch.items()
    elif isinstance(batch, Sequence):
        named = enumerate(batch)
    else:
        named = [(0, batch)]
    return {str(name): part for name, part in named if hasattr(part, "shape") and hasattr(part, "dtype")}


def find_pad_id(model: Any) -> int | None:
    """The padding token: the model's ``config.pad_token_id`` or an embedding's ``padding_idx``."""
    configured = getattr(getattr(model, "config", None), "pad_token_id", None)
    if configured is not None:
        return int(configured)
    for module in model.modules():
        if (padding := getattr(module, "padding_idx", None)) is not None:
            return int(padding)
    return None


def _padding(parts: Mapping[str, Tensor], pad_id: int | None) -> tuple[int, int] | None:
    """(padding tokens, tokens) of a batch, or None when it cannot be told."""
    mask = next((part for name, part in parts.items() if name.endswith("attention_mask")), None)
    if mask is not None:
        return int((mask == 0).sum()), mask.numel()
    first = next(iter(parts.values()), None)
    if pad_id is None or first is None or first.is_floating_point():
        return None
    return int((first == pad_id).sum()), first.numel()


def batch_statistics(batches: Iterable[Any], *, limit: int, pad_id: int | None = None) -> BatchStatistics:
    """Looks at the first ``limit`` batches.

    Padding is found through a part named ``…attention_mask`` (0 = padding), else by ``pad_id`` in
    the first part, if that holds integers.

    Raises:
        InvalidInput: there is no batch, or a batch holds no tensor.
    """
    count = rows = tokens = size_bytes = padded = 0
    padding_known = True
    seen: dict[str, PartStatistics] = {}
    for batch in islice(batches, limit):
        parts = tensor_parts(batch)
        if not parts:
            raise InvalidInput(f"batch {count} holds no tensor; a batch is a tuple or dict of tensors")
        first = next(iter(parts.values()))
        padding = _padding(parts, pad_id)
        padding_known = padding_known and padding is not None
        padded += padding[0] if padding else 0
        tokens += padding[1] if padding else first.numel()
        rows += int(first.shape[0]) if first.dim() else 1
        size_bytes += sum(part.numel() * part.element_size() for part in parts.values())
        for name, part in parts.items():
            seen[name] = _widen(seen.get(name), name, part)
        count += 1
    if not count:
        raise InvalidInput("there is no batch to look at")
    fraction = padded / tokens if padding_known and tokens else None
    return BatchStatistics(
        batches=count,
        rows=rows,
        tokens=tokens,
        padded_fraction=fraction,
        size_bytes=size_bytes,
        parts=tuple(seen.values()),
    )


def _widen(known: PartStatistics | None, name: str, part: Tensor) -> PartStatistics:
    shape = tuple(int(size) for size in part.shape)
    if known is None or len(known.smallest) != len(shape):
        return PartStatistics(
            name=name, dtype=str(part.dtype).removeprefix("torch."), smallest=shape, largest=shape
        )
    return PartStatistics(
        name=name,
        dtype=known.dtype,
        smallest=tuple(map(min, known.smallest, shape)),
        largest=tuple(map(max, known.largest, shape)),
    )
