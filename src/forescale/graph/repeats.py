"""Repeated blocks of a model: operators that follow each other again and again, equal up to names.

Operators become codes, equal for equal targets, arguments, shapes and parameter shapes. The maximal
repetitions ("runs") of the string of codes are found by its Lyndon words (Bannai et al., *The "Runs"
Theorem*, SIAM J. Comput. 2017), with ranks of all substrings of lengths 2^k (Karp, Miller, Rosenberg, STOC
1972) in place of a suffix tree: O(n log n). Wiring is part of the codes as far as it reaches, in doubling
distances, and is then compared in full: a tensor is read from as far before, or it is the same tensor.

Axes: O = operator, X = position in a string, R = run, E = reference of an operator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from forescale.graph.model import ModelGraph, Operator

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """Blocks of ``per_block`` operators from ``start`` on, equal up to names; ``length`` operators in all.

    There are at least two whole blocks; the last one may be followed by the beginning of another.
    """

    start: int
    per_block: int
    length: int

    @property
    def count(self) -> int:
        """Whole blocks."""
        return self.length // self.per_block


def repetitions(graph: ModelGraph) -> tuple[Repetition, ...]:
    """All that cannot be extended, by their start, the longest first. They may overlap and contain others."""
    references = _References.of(graph)
    local_O = equal_operators(graph)
    found: set[tuple[int, int, int]] = set()
    known: set[bytes] = set()
    for reach in (0, *(1 << power for power in range(len(local_O).bit_length() + 1))):
        code_O = references.codes(local_O, reach)
        if code_O.tobytes() not in known:
            known.add(code_O.tobytes())
            for start, period, length in runs(code_O):
                found.update(references.equal_stretches(start, period, length))
    kept = [Repetition(start=s, per_block=p, length=n) for s, p, n in _maximal(found)]
    return tuple(sorted(kept, key=lambda r: (r.start, -r.length, r.per_block)))


def disjoint(found: Iterable[Repetition]) -> tuple[Repetition, ...]:
    """Repetitions without overlap, in order, those first that spare most: all but their first block.

    What overlaps with one taken before is cut off, if two blocks are left.
    """
    taken: list[Repetition] = []
    ends: dict[int, int] = {}
    for repetition in sorted(found, key=lambda r: (r.per_block - r.length, r.start)):
        start, end = repetition.start, repetition.start + repetition.length
        for other in taken:
            if other.start <= start < ends[other.start]:
                start = ends[other.start]
            elif start < other.start < end:
                end = other.start
        if end - start >= 2 * repetition.per_block:
            taken.append(Repetition(start=start, per_block=repetition.per_block, length=end - start))
            ends[start] = end
    return tuple(sorted(taken, key=lambda r: r.start))


def equal_operators(graph: ModelGraph) -> IntArray:
    """Equal numbers for operators that are equal up to names and wiring, and so cost the same."""
    return _numbered(_signature(graph, operator) for operator in graph.operators)


def runs(code_X: IntArray) -> set[tuple[int, int, int]]:
    """Start, period and length of all maximal repetitions of a string: at least twice their least period."""
    size = len(code_X)
    if size < 2:
        return set()
    ahead, behind = _levels(code_X), _levels(code_X[::-1])
    found: set[tuple[int, int, int]] = set()
    for rank_X in (ahead[-1], _levels(code_X.max() - code_X)[-1]):
        # From each position the longest Lyndon word, which ends where the next smaller suffix begins.
        first_X = np.arange(size)
        next_X = _next_smaller(rank_X)
        first_X, next_X = first_X[next_X < size], next_X[next_X < size]
        right_X = _in_common(ahead, first_X, next_X)
        left_X = _in_common(behind, size - first_X, size - next_X)
        start_X, end_X, period_X = first_X - left_X, next_X + right_X, next_X - first_X
        is_run_X = end_X - start_X >= 2 * period_X
        columns = (start_X, period_X, end_X - start_X)
        found.update(zip(*(column[is_run_X].tolist() for column in columns), strict=True))
    return found


def _levels(code_X: IntArray) -> list[IntArray]:
    """Ranks of the substrings of lengths 1, 2, 4, … from every position, in their order; a prefix is smaller.

    No two that are cut short by the end are equal.
    """
    size = len(code_X)
    levels = [np.unique(code_X, return_inverse=True)[1]]
    length = 1
    while length < size:
        behind_X = np.zeros(size, dtype=np.int64)
        behind_X[: size - length] = levels[-1][length:] + 1
        levels.append(np.unique(levels[-1] * (size + 1) + behind_X, return_inverse=True)[1])
        length *= 2
    return levels


def _next_smaller(rank_X: IntArray) -> IntArray:
    """The next position with a smaller rank, or the end."""
    next_X = np.full(len(rank_X), len(rank_X))
    waiting: list[int] = []
    for position, rank in enumerate(rank_X.tolist()):
        while waiting and rank < rank_X[waiting[-1]]:
            next_X[waiting.pop()] = position
        waiting.append(position)
    return next_X


def _in_common(levels: Sequence[IntArray], one_X: IntArray, other_X: IntArray) -> IntArray:
    """How many codes the string has in common from two positions on, which may lie behind its end."""
    size = len(levels[0])
    common_X = np.zeros(len(one_X), dtype=np.int64)
    for power in reversed(range(len(levels))):
        at_X, beside_X = one_X + common_X, other_X + common_X
        inside_X = np.maximum(at_X, beside_X) < size
        level_X = levels[power]
        equal_X = inside_X & (level_X[at_X * inside_X] == level_X[beside_X * inside_X])
        common_X += equal_X << power
    return common_X


def _maximal(found: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those that lie in no other of the same period."""
    reached: dict[int, int] = {}
    kept: list[tuple[int, int, int]] = []
    for start, period, length in sorted(found, key=lambda run: (run[0], -run[2])):
        if start + length > reached.get(period, -1):
            reached[period] = start + length
            kept.append((start, period, length))
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _References:
    """What operators refer to: tensors, parameters, buffers, in the order of the operators.

    Attributes:
        first_O: position of each operator's first reference, and the number of all.
        name_E: number of what it is; ``origin_E``: how far before it was made, or was read last.
        span_E: from where it is made or first read to where it is read last.
    """

    first_O: IntArray
    name_E: IntArray
    origin_E: IntArray
    span_E: IntArray

    @classmethod
    def of(cls, graph: ModelGraph) -> _References:
        names = [(*o.inputs, *o.parameters, *o.buffers) for o in graph.operators]
        made = {n: (o.index, s) for o in graph.operators for s, n in enumerate(o.outputs) if n is not None}
        last = {name: index for index, row in enumerate(names) for name in row}
        first: dict[str, int] = {}
        read: dict[str, int] = {}
        origins: list[Hashable] = []
        spans: list[int] = []
        for index, row in enumerate(names):
            for name in row:
                maker, slot = made.get(name, (None, 0))
                before = read.get(name) if maker is None else maker
                origins.append((maker is None, slot, None if before is None else index - before))
                spans.append(last[name] - (first.setdefault(name, index) if maker is None else maker))
            read.update(dict.fromkeys(row, index))
        return cls(
            first_O=np.cumsum([0, *map(len, names)]),
            name_E=_numbered(name for row in names for name in row),
            origin_E=_numbered(origins),
            span_E=np.array(spans, dtype=np.int64),
        )

    def codes(self, local_O: IntArray, reach: int) -> IntArray:
        """Codes of operators with the origin of what spans no more than ``reach`` operators."""
        value_E = np.where(self.span_E <= reach, self.origin_E + 1, 0)
        code_O, count_O = local_O, np.diff(self.first_O)
        for place in range(int(count_O.max(initial=0))):
            has_O = count_O > place
            value_O = np.zeros(len(code_O), dtype=np.int64)
            value_O[has_O] = value_E[self.first_O[:-1][has_O] + place]
            code_O = np.unique(code_O * (value_E.max() + 1) + value_O, return_inverse=True)[1]
        return code_O

    def equal_stretches(self, start: int, period: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The parts of a run of equal local codes in which the wiring is equal too."""
        stop = start + length - period
        here = slice(self.first_O[start], self.first_O[stop])
        there = slice(self.first_O[start + period], self.first_O[stop + period])
        differs_E = self.name_E[here] != self.name_E[there]
        differs_E &= self.origin_E[here] != self.origin_E[there]
        owner_E = np.searchsorted(self.first_O, here.start + np.flatnonzero(differs_E), side="right") - 1
        bounds = [start - 1, *dict.fromkeys(owner_E.tolist()), stop]
        for before, after in pairwise(bounds):
            if after - before - 1 >= period:
                yield before + 1, period, after - before - 1 + period


def _signature(graph: ModelGraph, operator: Operator) -> Hashable:
    """All that is equal in two operators that are the same but for names and wiring."""
    place = {
        **{("tensor", name): place for place, name in enumerate(operator.inputs)},
        **{("parameter", name): place for place, name in enumerate(operator.parameters)},
        **{("buffer", name): place for place, name in enumerate(operator.buffers)},
    }

    def nameless(value: Any) -> Hashable:
        if isinstance(value, Mapping):
            ((kind, name),) = cast(Mapping[str, Any], value).items()
            return (kind, place[kind, name] if kind in ("tensor", "parameter", "buffer") else nameless(name))
        if isinstance(value, (list, tuple)):
            return tuple(map(nameless, cast(Sequence[Any], value)))
        return (type(value).__name__, value)

    tensors, parameters, buffers = graph.tensors, graph.parameters, graph.buffers
    read = [tensors[name] for name in operator.inputs]
    made = [tensors[name] if name else None for name in operator.outputs]
    return (
        operator.target,
        nameless(operator.args),
        tuple((key, nameless(value)) for key, value in sorted(operator.kwargs.items())),
        tuple((t.shape, t.dtype, t.requires_grad, t.producer is None) for t in read),
        tuple((t.shape, t.dtype, t.requires_grad) if t else None for t in made),
        tuple((p.shape, p.dtype, p.trainable) for p in (parameters[name] for name in operator.parameters)),
        tuple((b.shape, b.dtype) for b in (buffers[name] for name in operator.buffers)),
        tuple(place.get(("buffer", name)) for name in operator.mutated_buffers),
        operator.returns_tuple,
        operator.random,
    )


def _numbered(values: Iterable[Hashable]) -> IntArray:
    """Numbers from 0 in the order in which values first come; equal ones have equal numbers."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(value, len(number)) for value in values], dtype=np.int64)
