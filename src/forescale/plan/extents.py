"""Parts of a tensor: positions along some of its axes, as devices hold them that split its operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forescale.graph.sharding import Slice

Spans = tuple[tuple[int, int], ...]
"""Positions along one axis: ``[start, stop)`` each, ascending, apart from each other."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The elements whose position along each of these axes is in one of its spans.

    Attributes:
        axes: (axis, spans), by ascending axis; of an axis that is not named, it has all positions.
    """

    axes: tuple[tuple[int, Spans], ...] = ()

    @classmethod
    def of(cls, part: Slice | None) -> Extent:
        """What a slice holds; everything if there is none."""
        if part is None or (part.start, part.stop) == (0, part.units):
            return WHOLE
        first, last = part.start * part.inner, part.stop * part.inner
        starts = [outer * part.units * part.inner for outer in range(part.outer)]
        return cls(((part.axis, tuple((start + first, start + last) for start in starts)),))

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Its shape, if the tensor has the shape ``whole``."""
        sizes = list(whole)
        for axis, spans in self.axes:
            sizes[axis] = _length(spans)
        return tuple(sizes)

    def meet(self, other: Extent) -> Extent | None:
        """What both have, None if that is nothing."""
        axes = dict(self.axes)
        for axis, spans in other.axes:
            axes[axis] = _meet(axes[axis], spans) if axis in axes else spans
            if not axes[axis]:
                return None
        return Extent(tuple(sorted(axes.items())))

    def without(self, other: Extent, whole: Sequence[int]) -> Extent | None:
        """What it has and ``other``, which names one axis at most, has not; None if that is nothing."""
        if not other.axes:
            return None
        ((axis, spans),) = other.axes
        bounds = [0, *(bound for span in spans for bound in span), whole[axis]]
        gaps = tuple((a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b)
        return self.meet(Extent(((axis, gaps),)))

    def within(self, held: Extent) -> Extent:
        """Where it lies in a tensor that is nothing but ``held``, of which it is a part."""
        outer = dict(held.axes)
        axes = {axis: _within(spans, outer.get(axis)) for axis, spans in self.axes}
        return Extent(tuple((axis, spans) for axis, spans in axes.items() if spans))


WHOLE = Extent()


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _meet(a: Spans, b: Spans) -> Spans:
    pairs = [(max(start, first), min(stop, last)) for start, stop in a for first, last in b]
    return tuple(sorted(pair for pair in pairs if pair[0] < pair[1]))


def _within(spans: Spans, held: Spans | None) -> Spans:
    """Empty if the spans are all that is held."""
    if held is None:
        return spans
    found: list[tuple[int, int]] = []
    offset = 0
    for first, last in held:
        inside = _meet(spans, ((first, last),))
        found += [(start - first + offset, stop - first + offset) for start, stop in inside]
        offset += last - first
    return () if _length(spans) == offset else tuple(found)
