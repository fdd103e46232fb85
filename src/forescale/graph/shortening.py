"""Memory of a deep model from a shallow one: of many equal blocks four are run, the others follow.

The blocks kept are the first three and the last. If what happens to storages in the second and in the third
is the same, the blocks left out behave like them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from forescale.graph.model import MemoryEvent, ModelGraph, SavedStorage
from forescale.graph.repeats import Repetition, disjoint, repetitions

_KEPT = 4
_FEWEST_BLOCKS = 6

_Key = tuple[int, bool, int]
"""A storage of a block: the operator in it whose call begins it, if in the backward, and which of those."""
_Place = tuple[int, _Key]
"""Block and storage of it."""


class _Irregular(Exception):
    """The blocks are not as alike as their operators are."""


def shortened(graph: ModelGraph) -> Shortened | None:
    """The graph without most of its equal blocks; None if there are few, or others read what they make."""
    found = [r for r in disjoint(repetitions(graph)) if r.count >= _FEWEST_BLOCKS]
    if not found:
        return None
    blocks = max(found, key=lambda r: r.length - r.per_block * _KEPT)
    short = Shortened(graph=graph, blocks=blocks)
    return short if short.is_closed else None


@dataclass(frozen=True, kw_only=True)
class Shortened:
    """A graph and the blocks of which it is rid."""

    graph: ModelGraph
    blocks: Repetition

    @property
    def _left_out(self) -> int:
        return self.blocks.count - _KEPT

    @property
    def _shift(self) -> int:
        return self._left_out * self.blocks.per_block

    def _short_index(self, index: int) -> int | None:
        """Of an operator of the whole graph; None if it is left out."""
        kept_until = self.blocks.start + (_KEPT - 1) * self.blocks.per_block
        if index < kept_until:
            return index
        return index - self._shift if index >= kept_until + self._shift else None

    def whole_index(self, index: int) -> int:
        kept_until = self.blocks.start + (_KEPT - 1) * self.blocks.per_block
        return index if index < kept_until else index + self._shift

    @property
    def is_closed(self) -> bool:
        """Whether nothing but the next blocks and the last ones reads what is left out."""
        graph = self.graph
        leaving = {*graph.outputs, *(update.tensor for update in graph.buffer_updates)}
        made = [graph.tensors[name].producer for name in leaving]
        if any(producer is not None and self._short_index(producer) is None for producer in made):
            return False
        return self._renamed is not None

    @cached_property
    def _renamed(self) -> Mapping[str, str] | None:
        """Tensors left out that operators kept read, and those that take their place."""
        renamed: dict[str, str] = {}
        for operator in self.graph.operators:
            if self._short_index(operator.index) is None:
                continue
            for name in operator.inputs:
                producer = self.graph.tensors[name].producer
                if producer is None or self._short_index(producer) is not None:
                    continue
                twin = producer - self._shift
                if twin < self.blocks.start + self.blocks.per_block:
                    return None
                slot = self.graph.operators[producer].outputs.index(name)
                other = self.graph.operators[twin].outputs[slot]
                if other is None:
                    return None
                renamed[name] = other
        return renamed

    @cached_property
    def short(self) -> ModelGraph:
        graph, renamed = self.graph, self._renamed or {}
        operators = [
            replace(
                operator,
                index=index,
                args=_with_names(operator.args, renamed),
                kwargs=_with_names(operator.kwargs, renamed),
                inputs=tuple(renamed.get(name, name) for name in operator.inputs),
            )
            for operator in graph.operators
            if (index := self._short_index(operator.index)) is not None
        ]
        read = {name for operator in operators for name in operator.parameters}
        made = {name: operator.index for operator in operators for name in operator.outputs if name}
        readers: dict[str, list[int]] = {}
        for operator in operators:
            for name in operator.inputs:
                readers.setdefault(name, []).append(operator.index)
        return replace(
            graph,
            operators=tuple(operators),
            tensors={
                name: replace(tensor, producer=made.get(name), consumers=tuple(readers.get(name, ())))
                for name, tensor in graph.tensors.items()
                if tensor.producer is None or name in made
            },
            parameters={name: parameter for name, parameter in graph.parameters.items() if name in read},
        )

    def lengthened(self, measured: ModelGraph) -> ModelGraph | None:
        """The whole graph with what was measured on the short one; None if that cannot be said."""
        try:
            journal = _Journal(self, measured)
            return replace(self.graph, saved=journal.saved(), memory=journal.memory())
        except (_Irregular, KeyError):
            return None


def _with_names(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        entries = cast(Mapping[str, Any], value)
        if set(entries) == {"tensor"}:
            return {"tensor": renamed.get(entries["tensor"], entries["tensor"])}
        return {key: _with_names(entry, renamed) for key, entry in entries.items()}
    if isinstance(value, (list, tuple)):
        entries = [_with_names(entry, renamed) for entry in cast(Sequence[Any], value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


class _Journal:
    """Events of the short graph, with the blocks they belong to."""

    def __init__(self, shortened: Shortened, measured: ModelGraph) -> None:
        self._it, self._measured = shortened, measured
        self._last = shortened.blocks.count - 1
        self._home: dict[str, _Place] = {}
        self._name: dict[_Place, str] = {}
        begun: dict[tuple[int, bool], int] = {}
        for event in measured.memory:
            if event.begins:
                turn = (event.operator, event.backward)
                begun[turn] = begun.get(turn, -1) + 1
                if (block := self._block(event.operator)) is not None:
                    place = (block, (self._offset(event.operator), event.backward, begun[turn]))
                    self._home[event.storage], self._name[place] = place, event.storage
        events_B = [[e for e in measured.memory if self._block(e.operator) == b] for b in range(_KEPT)]
        if [self._relative(e) for e in events_B[1]] != [self._relative(e) for e in events_B[2]]:
            raise _Irregular

    def memory(self) -> tuple[MemoryEvent, ...]:
        """Of the whole graph: those of the third block again, behind its forward and before its backward."""
        events = self._measured.memory
        own = [index for index, event in enumerate(events) if self._block(event.operator) == 2]
        forward = [index for index in own if not events[index].backward]
        backward = [index for index in own if events[index].backward]
        for indices in (forward, backward):
            if indices and indices[-1] - indices[0] + 1 != len(indices):
                raise _Irregular
        after = forward[-1] + 1 if forward else 0
        before = backward[0] if backward else len(events)
        copies = range(1, self._it.blocks.count - _KEPT + 1)
        return (
            *(self._moved(event, 0) for event in events[:after]),
            *(self._moved(events[index], copy) for copy in copies for index in forward),
            *(self._moved(event, 0) for event in events[after:before]),
            *(self._moved(events[index], copy) for copy in reversed(copies) for index in backward),
            *(self._moved(event, 0) for event in events[before:]),
        )

    def saved(self) -> tuple[SavedStorage, ...]:
        found: list[SavedStorage] = []
        rows: dict[int, list[Any]] = {1: [], 2: []}
        for storage in self._measured.saved:
            owner = self._owner(storage)
            block = None if owner is None else self._block(owner)
            if block is None or owner is None:
                found.append(self._read_by_all(storage))
                continue
            readers = [(self._block(o), self._offset(o)) for o in storage.operators]
            if any(reader is None and block < _KEPT - 1 for reader, _ in readers):
                raise _Irregular
            reach = [(None if reader is None else reader - block, offset) for reader, offset in readers]
            if block in rows:
                rows[block].append((self._offset(owner), reach, storage.size_bytes))
            copies = range(1, self._it.blocks.count - _KEPT + 1) if block == 2 else ()
            found += [self._saved_again(storage, block, copy) for copy in (0, *copies)]
        if rows[1] != rows[2]:
            raise _Irregular
        return tuple(sorted(found, key=lambda storage: storage.operators[0]))

    # --- places ----------------------------------------------------------------------------------

    def _block(self, operator: int) -> int | None:
        """Of an operator of the short graph; None outside of the blocks."""
        block, _ = divmod(operator - self._it.blocks.start, self._it.blocks.per_block)
        return block if 0 <= block < _KEPT else None

    def _offset(self, operator: int) -> int:
        return (operator - self._it.blocks.start) % self._it.blocks.per_block

    def _whole_block(self, block: int, copy: int) -> int:
        """Of the whole graph: the third block has copies, the last one is the last."""
        return self._last if block == _KEPT - 1 else block + copy

    def _operator(self, block: int, offset: int) -> int:
        return self._it.blocks.start + block * self._it.blocks.per_block + offset

    def _relative(self, event: MemoryEvent) -> tuple[Any, ...]:
        home, block = self._home[event.storage], self._block(event.operator)
        assert block is not None, "only events of blocks are compared"
        if abs(home[0] - block) > 1:
            raise _Irregular
        what = (event.backward, event.begins, event.size_bytes)
        return self._offset(event.operator), home[0] - block, home[1], what

    # --- events ----------------------------------------------------------------------------------

    def _moved(self, event: MemoryEvent, copy: int) -> MemoryEvent:
        block, operator = self._block(event.operator), event.operator
        if block is None:
            whole = operator if operator < 0 else self._it.whole_index(operator)
        else:
            whole = self._operator(self._whole_block(block, copy), self._offset(operator))
        return replace(event, operator=whole, storage=self._storage(event, block, copy))

    def _storage(self, event: MemoryEvent, block: int | None, copy: int) -> str:
        if event.storage not in self._home:
            return event.storage
        home, key = self._home[event.storage]
        if block is None:
            # Before the blocks only the first of them is read, behind them the last.
            first = event.operator < self._it.blocks.start
            if home not in ((0, 1) if first else (_KEPT - 2, _KEPT - 1)):
                raise _Irregular
            whole = home if first else self._last + home - (_KEPT - 1)
        else:
            whole = self._whole_block(block, copy) + home - block
        return self._named(whole, key)

    def _named(self, whole: int, key: _Key) -> str:
        """The storage's name in the whole graph."""
        if whole == self._last:
            return self._tensor_name(self._name[_KEPT - 1, key], _KEPT - 1, whole)
        template = min(whole, _KEPT - 2)
        return self._tensor_name(self._name[template, key], template, whole)

    def _tensor_name(self, name: str, block: int, whole: int) -> str:
        tensor = self._measured.tensors.get(name)
        if tensor is None or tensor.producer is None:
            return name if whole in (block, self._last) else f"{name}+{whole - block}"
        if self._block(tensor.producer) != block:
            raise _Irregular
        slot = self._measured.operators[tensor.producer].outputs.index(name)
        twin = self._it.graph.operators[self._operator(whole, self._offset(tensor.producer))].outputs[slot]
        if twin is None:
            raise _Irregular
        return twin

    # --- saved storages --------------------------------------------------------------------------

    def _owner(self, storage: SavedStorage) -> int | None:
        """The operator that makes it, None if it is part of the batch."""
        tensor = self._measured.tensors.get(storage.name)
        return storage.operators[0] if tensor is None else tensor.producer

    def _read_by_all(self, storage: SavedStorage) -> SavedStorage:
        """What is made outside: a block that is left out reads it as the one before does."""
        readers: list[list[int]] = [[] for _ in range(_KEPT)]
        others: list[int] = []
        for operator in storage.operators:
            if (block := self._block(operator)) is None:
                others.append(self._it.whole_index(operator))
            else:
                readers[block].append(self._offset(operator))
        if readers[1] != readers[2]:
            raise _Irregular
        whole = [readers[0], *[readers[1]] * (self._last - 1), readers[-1]]
        own = [self._operator(block, offset) for block, row in enumerate(whole) for offset in row]
        return replace(storage, operators=tuple(sorted([*others, *own])))

    def _saved_again(self, storage: SavedStorage, block: int, copy: int) -> SavedStorage:
        operators = [
            self._it.whole_index(operator)
            if (reader := self._block(operator)) is None
            else self._operator(self._whole_block(block, copy) + reader - block, self._offset(operator))
            for operator in storage.operators
        ]
        name, _, number = storage.name.partition("#")
        whole = self._whole_block(block, copy)
        if number and storage.name not in self._measured.tensors:
            name = f"{self._it.graph.operators[operators[0]].name}#{number}"
        else:
            name = self._tensor_name(storage.name, block, whole)
        return replace(storage, name=name, operators=tuple(operators))
