"""The operators of one device, where several split a stage's operators between them: tensor parallelism.

Each shard runs the same operators in the same order. In a region (:mod:`forescale.graph.regions`) it runs
them on its own part of the tensors; everywhere else all run them on whole tensors. Inserted operators
exchange what a shard needs of the others (Shoeybi et al., *Megatron-LM*, 2019: f is ``spread``, g is
``total``):

    target               arguments                        forward            backward
    collective:spread    x                                x                  sum over the shards
    collective:total     x                                sum over shards    the gradient itself
    collective:gather    x, axis, outer, inner, bounds    whole from parts   own part
    collective:part      x, axis, outer, inner, bounds    own part           whole from parts

An axis is outer x units x inner; of every outer, shard k has the units from ``bounds[k]`` to the next bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from forescale.graph.dimensions import Dimensions, Key
from forescale.graph.flows import aten_name, references
from forescale.graph.model import ModelGraph, Operator, Size, Tensor
from forescale.graph.regions import Region, find_regions

_KEPT = 64
"""Shards that are remembered: planner and engine ask for the same ones again and again."""
_WITHOUT_SUM = {"addmm": "aten.mm.default", "baddbmm": "aten.bmm.default"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A shard's part of a parameter: its ``axis`` is outer x units x inner; of every outer, some units."""

    axis: int
    outer: int
    units: int
    inner: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """What one shard runs.

    Attributes:
        graph: its operators, renumbered, and what they read; tensors from outside have no producer.
            Parameters and buffers have the shapes of its parts, and the names they have in the whole graph.
        origin_O: for every operator the one it was in the whole graph; -1 for those that were inserted.
        fraction_O: which part of that operator's work it does.
        units_O: in how many units that operator's work is shared out; 1 if every shard does all of it.
        slices: the parameters and buffers it holds a part of; the others it holds whole.
    """

    graph: ModelGraph
    origin_O: tuple[int, ...]
    fraction_O: tuple[float, ...]
    units_O: tuple[int, ...]
    slices: Mapping[str, Slice]


class Sharding:
    """All ways to split a graph's operators; what they have in common is found once."""

    def __init__(self, graph: ModelGraph) -> None:
        self._dimensions = Dimensions(graph)
        self._known_regions = lru_cache(maxsize=_KEPT)(self._regions)
        self._known_shards = lru_cache(maxsize=_KEPT)(self._shard)

    def shard(
        self, operators: Sequence[int], index: int, weights: Sequence[int], outputs: Sequence[str]
    ) -> Sharded:
        """What shard ``index`` of ``len(weights)`` runs of these operators.

        Args:
            weights: sizes of the parts, in proportion.
            outputs: tensors that others read; they stay whole.
        """
        graph, own = self._dimensions.graph, tuple(sorted(operators))
        made = {name for index in own for name in graph.operators[index].outputs}
        updated = (update.tensor for update in graph.buffer_updates if update.tensor in made)
        kept = tuple(dict.fromkeys((*outputs, *updated)))
        return self._known_shards(own, index, tuple(weights), kept)

    def _shard(
        self, operators: tuple[int, ...], index: int, weights: tuple[int, ...], outputs: tuple[str, ...]
    ) -> Sharded:
        regions = self._known_regions(operators, outputs, len(weights))
        return _Writer(self._dimensions, regions, index, weights).write(operators, outputs)

    def _regions(self, operators: tuple[int, ...], outputs: tuple[str, ...], parts: int) -> list[Region]:
        return find_regions(self._dimensions, operators, outputs, parts)


def shard_operators(
    graph: ModelGraph, operators: Sequence[int], index: int, weights: Sequence[int], outputs: Sequence[str]
) -> Sharded:
    """What shard ``index`` of ``len(weights)`` runs of these operators, see :meth:`Sharding.shard`."""
    return _sharding(_Same(graph)).shard(operators, index, weights, outputs)


@dataclass(frozen=True, eq=False)
class _Same:
    """A graph that is equal to itself alone: comparing what it holds takes longer than any use of it."""

    graph: ModelGraph

    def __hash__(self) -> int:
        return id(self.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.graph is self.graph


@lru_cache(maxsize=4)
def _sharding(same: _Same) -> Sharding:
    return Sharding(same.graph)


def share_units(units: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Bounds of parts in whole units, each at least one, in proportion by largest remainder."""
    quotas = [units * weight / sum(weights) for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) != units:
        step = 1 if sum(counts) < units else -1
        rests = [
            step * (quota - count) if count + step else -units
            for quota, count in zip(quotas, counts, strict=True)
        ]
        counts[rests.index(max(rests))] += step
    return (0, *accumulate(counts))


class _Writer:
    """Writes the operators of one shard."""

    def __init__(
        self, dimensions: Dimensions, regions: Sequence[Region], index: int, weights: Sequence[int]
    ) -> None:
        self._dimensions, self._graph = dimensions, dimensions.graph
        self._index, self._weights = index, weights
        self._region_of = {operator: region for region in regions for operator in region.operators}
        self._parted = {name: region for region in regions for name in region.parted}
        self._state = {key: region for region in regions for key in region.state}
        self._bounds = {r.factor: share_units(dimensions.units(r.factor), weights) for r in regions}
        self._operators: list[Operator] = []
        self._origin: list[int] = []
        self._tensors: dict[str, Tensor] = {}
        self._made: dict[tuple[str, Key, int], str] = {}  # inserted once for all readers

    def write(self, operators: Sequence[int], outputs: Sequence[str]) -> Sharded:
        for index in operators:
            operator, region = self._graph.operators[index], self._region_of.get(index)
            if region is None:
                for name in operator.inputs:
                    self._whole(name, operator)
                for name in operator.outputs:
                    if name:
                        self._tensors[name] = self._graph.tensors[name]
                self._append(operator, index)
            else:
                self._write_part(operator, region)
        for name in outputs:
            if (region := self._parted.get(name)) is not None:
                self._whole(name, self._graph.operators[max(region.operators)])
        regions = [self._region_of.get(origin) for origin in self._origin]
        return Sharded(
            graph=self._local_graph(outputs),
            origin_O=tuple(self._origin),
            fraction_O=tuple(self._fraction(region) if region else 1.0 for region in regions),
            units_O=tuple(self._dimensions.units(region.factor) if region else 1 for region in regions),
            slices={key[1]: self._slice(key, region) for key, region in self._state.items()},
        )

    def _write_part(self, operator: Operator, region: Region) -> None:
        flow, sums = self._dimensions.flow(operator.index), operator.index in region.sums
        assert flow is not None, "only operators with a rule are in regions"
        added = flow.added if sums else None
        args = [
            None if position == added else self._argument(operator, position, region)
            for position in range(len(operator.args))
        ]
        target = operator.target
        if added is not None and (bare := _WITHOUT_SUM.get(aten_name(operator))):
            target, args = bare, [arg for arg in args if arg is not None]
        suffix = "@term" if sums else "@part"
        outputs = tuple(name and name + suffix for name in operator.outputs)
        for name, local in zip(operator.outputs, outputs, strict=True):
            if name and local:
                tensor = self._graph.tensors[name]
                shape = tensor.shape if sums else self._local_shape(("tensor", name), region)
                self._tensors[local] = replace(tensor, name=local, shape=shape)
        self._append(replace(operator, target=target, args=tuple(args), outputs=outputs), operator.index)
        if sums:
            self._write_sum(operator, operator.args[added] if added is not None else None)

    def _write_sum(self, operator: Operator, added: Any) -> None:
        name = next(name for name in operator.outputs if name)
        term, like = {"tensor": f"{name}@term"}, self._graph.tensors[name]
        if added is None:
            self._insert("collective:total", (term,), like, operator)
            return
        whole = replace(like, name=f"{name}@total")
        total = self._insert("collective:total", (term,), whole, operator)
        for _, tensor in (key for key in references(added) if key[0] == "tensor"):
            self._whole(tensor, operator)
        if "conv" in operator.target:  # channels are the second axis
            ((kind, bias),) = added.items()
            entry = self._dimensions.entry((kind, bias))
            shape = (*entry.shape, *[1] * (len(like.shape) - 2))
            columns = replace(
                like,
                name=f"{name}@bias",
                shape=shape,
                requires_grad=self._dimensions.has_gradient((kind, bias)),
            )
            added = self._insert("aten.reshape.default", (added, list(shape)), columns, operator)
        self._insert("aten.add.Tensor", (total, added), like, operator)

    def _argument(self, operator: Operator, position: int, region: Region) -> Any:
        argument = operator.args[position]
        flow = self._dimensions.flow(operator.index)
        if flow is None or position not in flow.sizes:
            return self._mapped(argument, operator, region)
        having = [
            region.factor in factors for factors in self._dimensions.factors_in(operator.index, position)
        ]
        if not isinstance(argument, (list, tuple)):
            return self._local_size(argument, region) if having[0] else argument
        return [
            self._local_size(size, region) if has else size
            for size, has in zip(argument, having, strict=True)
        ]

    def _mapped(self, value: Any, operator: Operator, region: Region) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._mapped(part, operator, region) for part in value]
        return self._operand(key, operator, region) if (key := next(references(value), None)) else value

    def _operand(self, key: Key, operator: Operator, region: Region) -> dict[str, str]:
        """What takes an operand's place in a region: its part if it has the factor, else all of it."""
        kind, name = key
        has = self._dimensions.has(key, region.factor)
        if has and (key in region.state or name in region.parted):
            return {kind: name} if kind != "tensor" else {kind: name + "@part"}
        if kind == "tensor":
            self._whole(name, operator)
        if not has and not self._dimensions.has_gradient(key):
            return {kind: name}
        target = "collective:part" if has else "collective:spread"
        known = (target, key, region.factor if has else -1)
        if known not in self._made:
            entry = self._dimensions.entry(key)
            local = Tensor(
                name=f"{name}@{'part' if has else 'spread'}{region.factor if has else ''}",
                producer=None,
                consumers=(),
                shape=self._local_shape(key, region) if has else entry.shape,
                dtype=entry.dtype,
                requires_grad=self._dimensions.has_gradient(key),
            )
            more = self._layout(key, region) if has else ()
            self._insert(target, ({kind: name}, *more), local, operator)
            self._made[known] = local.name
        return {"tensor": self._made[known]}

    def _whole(self, name: str, operator: Operator) -> None:
        """Sees to it that a tensor is there whole, for ``operator`` to read."""
        if (region := self._parted.get(name)) and name not in self._tensors:
            args = ({"tensor": name + "@part"}, *self._layout(("tensor", name), region))
            self._insert("collective:gather", args, self._graph.tensors[name], operator)

    def _layout(self, key: Key, region: Region) -> tuple[Any, ...]:
        cut = self._dimensions.cut(key, region.factor)
        return cut.axis, cut.outer, cut.inner, list(self._bounds[region.factor])

    def _insert(self, target: str, args: tuple[Any, ...], tensor: Tensor, like: Operator) -> dict[str, str]:
        self._tensors[tensor.name] = tensor
        inserted = Operator(
            index=0, name=tensor.name, target=target, args=args, kwargs={}, outputs=(tensor.name,),
            returns_tuple=False, module_path=like.module_path, source=like.source, random=False, inputs=(),
            parameters=(), buffers=(), mutated_buffers=(),
        )  # fmt: skip
        self._append(inserted, -1)
        return {"tensor": tensor.name}

    def _append(self, operator: Operator, origin: int) -> None:
        found = dict.fromkeys(references([*operator.args, *operator.kwargs.values()]))
        named = {kind: tuple(n for k, n in found if k == kind) for kind in ("tensor", "parameter", "buffer")}
        self._operators.append(
            replace(
                operator,
                index=len(self._operators),
                inputs=named["tensor"],
                parameters=named["parameter"],
                buffers=named["buffer"],
            )
        )
        self._origin.append(origin)

    def _own(self, region: Region) -> int:
        bounds = self._bounds[region.factor]
        return bounds[self._index + 1] - bounds[self._index]

    def _fraction(self, region: Region) -> float:
        return self._own(region) / self._dimensions.units(region.factor)

    def _local_size(self, size: Any, region: Region) -> Any:
        own, units = self._own(region), self._dimensions.units(region.factor)
        if isinstance(size, int):
            return size if size == -1 else size // units * own
        return {"size": f"({size['size']})*{own}//{units}"}

    def _local_shape(self, key: Key, region: Region) -> tuple[Any, ...]:
        cut, shape = self._dimensions.cut(key, region.factor), list[Size](self._dimensions.entry(key).shape)
        size = shape[cut.axis]
        wrapped = self._local_size(size if isinstance(size, int) else {"size": size}, region)
        shape[cut.axis] = wrapped if isinstance(wrapped, int) else wrapped["size"]
        return tuple(shape)

    def _slice(self, key: Key, region: Region) -> Slice:
        cut, bounds = self._dimensions.cut(key, region.factor), self._bounds[region.factor]
        return Slice(
            axis=cut.axis,
            outer=cut.outer,
            units=cut.units,
            inner=cut.inner,
            start=bounds[self._index],
            stop=bounds[self._index + 1],
        )

    def _local_graph(self, outputs: Sequence[str]) -> ModelGraph:
        graph, made = self._graph, {n: o.index for o in self._operators for n in o.outputs if n}
        readers: dict[str, list[int]] = {}
        for operator in self._operators:
            for name in operator.inputs:
                readers.setdefault(name, []).append(operator.index)
        entering = [n for n in dict.fromkeys((*readers, *outputs)) if n not in made]
        tensors = {
            name: replace(
                self._tensors.get(name) or graph.tensors[name],
                producer=made.get(name),
                consumers=tuple(readers.get(name, ())),
            )
            for name in (*entering, *made)
        }

        def local(kind: str, names: Collection[str]) -> dict[str, Any]:
            keys = [(kind, name) for name in names]
            regions = {key: self._state.get(key) for key in keys}
            return {
                key[1]: replace(self._dimensions.entry(key), shape=self._local_shape(key, region))
                if (region := regions[key])
                else self._dimensions.entry(key)
                for key in keys
            }

        return replace(
            graph,
            operators=tuple(self._operators),
            tensors=tensors,
            parameters=local("parameter", dict.fromkeys(n for o in self._operators for n in o.parameters)),
            buffers=local("buffer", dict.fromkeys(n for o in self._operators for n in o.buffers)),
            buffer_updates=tuple(u for u in graph.buffer_updates if u.tensor in made),
            inputs=tuple(entering),
            outputs=tuple(outputs),
            saved=(),
            memory=(),
        )
