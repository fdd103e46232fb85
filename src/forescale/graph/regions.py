"""Groups of operators that are worth splitting between devices, each along one factor of its axes.

A region begins where operators read parameters that have the factor (the columns of a linear layer, the
filters of a convolution), goes on through operators that leave it alone, and ends in operators that sum
over it, or where its parts are gathered: Shoeybi et al., *Megatron-LM*, 2019, found in any graph instead of
written into a model.

A region is split if the work and the parameters that its devices save are worth the bytes that they
exchange.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from forescale.graph.dimensions import Dimensions, Key, state_of
from forescale.graph.flows import references
from forescale.graph.model import Operator

FLOPS_PER_BYTE = 32
"""Work that is worth one exchanged byte: about what a processor does while its network sends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Operators that run on parts along one factor.

    Attributes:
        sums: those of them whose results are terms of a sum.
        parted: tensors they make, of which each device has its part.
        state: the parameters and buffers that they read parts of.
        worth: work and parameter bytes saved, over bytes exchanged.
    """

    factor: int
    operators: frozenset[int]
    sums: frozenset[int]
    parted: frozenset[str]
    state: frozenset[Key]
    worth: float


def find_regions(
    dimensions: Dimensions, operators: Collection[int], outputs: Collection[str], parts: int
) -> list[Region]:
    """The regions among some operators that are worth splitting in so many parts; no two share an operator.

    Those most worth come first, and take operators from the others.

    Args:
        outputs: tensors that others read, whole.
    """
    explorer = _Explorer(dimensions, frozenset(operators), frozenset(outputs))
    factors = [f for f in dimensions.operators_of if dimensions.units(f) >= parts]
    pending = [region for factor in factors for region in explorer.regions(factor, frozenset())]
    chosen: list[Region] = []
    taken: frozenset[int] = frozenset()
    while pending:
        best = max(pending, key=lambda region: region.worth)
        if best.worth < 1:
            break
        if best.operators & taken:  # what is left of this factor's regions may still be
            pending = [region for region in pending if region.factor != best.factor]
            pending += explorer.regions(best.factor, taken)
        else:
            pending.remove(best)
            chosen.append(best)
            taken |= best.operators
    return chosen


@dataclass(slots=True)
class _Members:
    """Operators that run on parts along a factor (``sums``: and sum over it), and the tensors they make."""

    sums: dict[int, bool] = field(default_factory=dict[int, bool])
    maker: dict[str, int] = field(default_factory=dict[str, int])


class _Explorer:
    def __init__(self, dimensions: Dimensions, operators: frozenset[int], outputs: frozenset[str]) -> None:
        self._dimensions = dimensions
        self._operators = operators
        self._outputs = outputs

    def regions(self, factor: int, taken: frozenset[int]) -> list[Region]:
        """What is connected of all operators that can run on parts, without those ``taken``."""
        refused = set(self._dimensions.updated)
        while True:
            members = self._members(factor, taken, refused)
            read = {key for index in members.sums for key in self._state(index, factor)}
            mixed = {key for key in read if any(r not in members.sums for r in self._dimensions.readers[key])}
            if not mixed:
                break
            refused |= mixed
        found = [self._region(factor, group, members) for group in self._connected(factor, members)]
        return [region for region in found if region is not None]

    def _members(self, factor: int, taken: frozenset[int], refused: set[Key]) -> _Members:
        members = _Members()
        for index in self._dimensions.operators_of[factor]:
            sums = self._dimensions.sums_over(index, factor)
            if sums is None or index not in self._operators or index in taken:
                continue
            operator = self._dimensions.graph.operators[index]
            if self._joins(operator, factor, sums, members, refused):
                members.sums[index] = sums
                if not sums:
                    members.maker.update((name, index) for name in operator.outputs if name)
        return members

    def _joins(
        self, operator: Operator, factor: int, sums: bool, members: _Members, refused: set[Key]
    ) -> bool:
        has = self._dimensions.has
        state = self._state(operator.index, factor)
        having = [name for name in operator.inputs if has(("tensor", name), factor)]
        results = [has(("tensor", name), factor) for name in operator.outputs if name]
        if any(count != (not sums) for count in results) or not refused.isdisjoint(state):
            return False
        if any(has(key, factor) > 1 for key in (*state, *(("tensor", name) for name in having))):
            return False
        entering = [("tensor", name) for name in having if name not in members.maker]
        if any(self._dimensions.has_gradient(key) for key in entering):
            return False  # shards would have to gather its gradient; better they gather the other operands
        return len(entering) < len(having) or (bool(state) and not having and not sums)

    def _state(self, index: int, factor: int) -> list[Key]:
        """The parameters and buffers with the factor that an operator reads."""
        operator = self._dimensions.graph.operators[index]
        return [key for key in state_of(operator) if self._dimensions.has(key, factor)]

    def _connected(self, factor: int, members: _Members) -> Iterable[list[int]]:
        """Members that read each other's parts, or parts of one parameter."""
        root = {index: index for index in members.sums}

        def find(index: int) -> int:
            while root[index] != index:
                root[index] = index = root[root[index]]
            return index

        holder: dict[Key, int] = {}
        for index in members.sums:
            inputs = self._dimensions.graph.operators[index].inputs
            makers = [members.maker[name] for name in inputs if name in members.maker]
            for other in (*makers, *(holder.setdefault(k, index) for k in self._state(index, factor))):
                root[find(index)] = find(other)
        groups: dict[int, list[int]] = {}
        for index in members.sums:
            groups.setdefault(find(index), []).append(index)
        return groups.values()

    def _region(self, factor: int, group: list[int], members: _Members) -> Region | None:
        """None if the parts of a tensor could not be put together."""
        dimensions, operators = self._dimensions, [self._dimensions.graph.operators[k] for k in group]
        inside = frozenset(group)
        parted = {name for o in operators if not members.sums[o.index] for name in o.outputs if name}
        state = frozenset(key for index in group for key in self._state(index, factor))
        read = {key for o in operators for key in operands(o, members.sums[o.index], dimensions)} - state
        entering = read - {("tensor", name) for name in parted}
        sliced = {key for key in entering if dimensions.has(key, factor)}
        gathered = {("tensor", name) for name in parted if self._leaves(name, inside)}
        if not all(dimensions.is_fixed(key, factor) for key in sliced | gathered):
            return None
        summed = {("tensor", n) for o in operators if members.sums[o.index] for n in o.outputs if n}
        twice = summed | {key for key in entering - sliced if dimensions.has_gradient(key)}
        exchanged_bytes = sum(map(dimensions.size_bytes, gathered)) + 2 * sum(
            map(dimensions.size_bytes, twice)
        )
        saved = sum(map(dimensions.work, group)) / FLOPS_PER_BYTE + sum(map(dimensions.size_bytes, state))
        return Region(
            factor=factor,
            operators=inside,
            sums=frozenset(index for index in group if members.sums[index]),
            parted=frozenset(parted),
            state=state,
            worth=saved / max(exchanged_bytes, 1),
        )

    def _leaves(self, name: str, inside: frozenset[int]) -> bool:
        """Whether a tensor is read whole: by another operator of these, or by others."""
        consumers = self._dimensions.graph.tensors[name].consumers
        return name in self._outputs or any(c in self._operators and c not in inside for c in consumers)


def operands(operator: Operator, sums: bool, dimensions: Dimensions) -> set[Key]:
    """What an operator reads when it runs on parts: all but what is added to a sum afterwards."""
    flow = dimensions.flow(operator.index)
    without = flow.added if flow is not None and sums else None
    return {key for k, argument in enumerate(operator.args) if k != without for key in references(argument)}
