"""Axes as products of factors, so that one part of a tensor can be followed through every view of it.

A fused projection of queries, keys and values has an axis of 3 * heads * width. A view may show those as
three axes, a split as three tensors, and a transposition and another view bring heads * width together
again: the factor ``heads`` is the same all along. Factors are found while operators are read: two axes that
an operator aligns become one, and a view that takes an axis apart splits its factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

Axis = tuple[int, ...]
"""Factors of an axis, outermost first; an axis of size 1 has none."""

Axes = tuple[Axis, ...]


class Unaligned(Exception):
    """Axes that have no common factors, or an operator whose axes are not understood."""


class Factors:
    """All factors of a graph's axes; equal ones are joined, and one may be split into smaller ones."""

    def __init__(self) -> None:
        self._size: list[int] = []
        self._into: dict[int, Axis] = {}

    def axis(self, size: int) -> Axis:
        """A new axis, so far unlike any other."""
        if size == 1:
            return ()
        self._size.append(size)
        return (len(self._size) - 1,)

    def sizes(self, axis: Axis) -> list[int]:
        return [self._size[factor] for factor in self.leaves(axis)]

    def size(self, axis: Axis) -> int:
        return prod(self.sizes(axis))

    def leaves(self, axis: Axis) -> Axis:
        """The factors as they are known now."""
        found: list[int] = []
        for factor in axis:
            if factor in self._into:
                self._into[factor] = self.leaves(self._into[factor])  # shortens the way for the next time
            found += self._into.get(factor, (factor,))
        return tuple(found)

    def join(self, one: Axis, other: Axis) -> None:
        """Notes that two axes are the same.

        Raises:
            Unaligned: their sizes have no common factors in this order.
        """
        ones, others = list(self.leaves(one)[::-1]), list(self.leaves(other)[::-1])
        while ones and others:
            a, b = self._next(ones), self._next(others)
            if self._size[a] > self._size[b]:
                a = self._split(a, self._size[b], ones)
            elif self._size[b] > self._size[a]:
                b = self._split(b, self._size[a], others)
            if (a := self.leaves((a,))[0]) != (b := self.leaves((b,))[0]):
                self._into[b] = (a,)
        if ones or others:
            raise Unaligned("axes of unequal sizes")

    def regroup(self, axes: Iterable[Axis], sizes: Sequence[int]) -> Axes:
        """The axes of a view with these sizes.

        Raises:
            Unaligned: one of its axes holds a part of a factor that does not divide it.
        """
        pending = [factor for axis in axes for factor in self.leaves(axis)][::-1]
        found: list[Axis] = []
        for size in sizes:
            axis, rest = list[int](), size
            while rest > 1 and pending:
                factor = self._next(pending)
                if self._size[factor] > rest:
                    factor = self._split(factor, rest, pending)
                if rest % self._size[factor]:
                    raise Unaligned("a view that mixes factors")
                axis.append(factor)
                rest //= self._size[factor]
            found.append(tuple(axis))
        if pending or [self.size(axis) for axis in found] != list(sizes):
            raise Unaligned("a view of another size")
        return tuple(found)

    def _next(self, pending: list[int]) -> int:
        """Takes the outermost of the factors that are left (the last in the list)."""
        first, *rest = self.leaves((pending.pop(),))
        pending += rest[::-1]
        return first

    def _split(self, factor: int, size: int, pending: list[int]) -> int:
        """The outer part of a factor; the inner part is put back."""
        if self._size[factor] % size:
            raise Unaligned("sizes that do not divide one another")
        outer, inner = self.axis(size), self.axis(self._size[factor] // size)
        self._into[factor] = (*outer, *inner)
        pending += inner
        return outer[0]
