"""A model's training forward as a graph of operators.

The graph is plain data: it can be written as JSON, planned on a machine without PyTorch, and turned
back into code by :mod:`forescale.graph.program`. It is functional: no operator changes a tensor in
place, except that ``BufferUpdate`` s are applied to buffers after a forward (and ``batch_norm``
updates its running statistics, see ``Operator.mutated_buffers``).

Sizes that depend on the batch are expressions over symbols (``"s0*s1"``), see :mod:`forescale.graph.size`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from forescale.core.errors import InvalidInput

Size = int | str
"""A number of elements or bytes: an int, or an expression over the graph's symbols."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A value that flows between operators, or enters as a batch input.

    As a hyperedge: it is sent once to every stage that reads it, whatever the number of readers.

    Attributes:
        producer: index of the operator that makes it; None for a batch input.
        consumers: indices of the operators that read it, ascending.
        shape: sizes of its axes.
        dtype: e.g. ``float32`` (the name of a ``torch.dtype``).
        requires_grad: whether a gradient flows back through it in training.
    """

    name: str
    producer: int | None
    consumers: tuple[int, ...]
    shape: tuple[Size, ...]
    dtype: str
    requires_grad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter, once per distinct tensor: ``aliases`` are its other names (tied weights)."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A buffer or a constant the forward reads (``persistent``: part of the state dict)."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    persistent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One call of a PyTorch operator (or, after a fall-back capture, of a whole module).

    Attributes:
        index: position in captured order, which is a topological order.
        target: ``aten.linear.default`` …, or ``module:PATH`` for a whole module.
        args, kwargs: arguments as JSON values; references are one-key dicts: ``{"tensor": name}``,
            ``{"parameter": name}``, ``{"buffer": name}``, ``{"size": expression}``,
            ``{"number": expression}`` (its value need not be whole),
            ``{"dtype": name}``, ``{"device": null}`` (the device it runs on), ``{"layout": name}``,
            ``{"memory_format": name}``.
        outputs: names of the tensors it makes, by position; None where nobody reads one.
        returns_tuple: whether the call returns a tuple or list (of ``len(outputs)``) and not one tensor.
        module_path: original module it came from, ``""`` for the root.
        source: ``file:line`` in the user's or library's code.
        random: draws random numbers, so it is seeded before each call.
        mutated_buffers: buffers the call itself updates in place.
    """

    index: int
    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str | None, ...]
    returns_tuple: bool
    module_path: str
    source: str
    random: bool
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    mutated_buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferUpdate:
    """After a forward, ``buffer`` takes the value of ``tensor``."""

    buffer: str
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolSource:
    """Where a symbol's value is read: axis ``axis`` of batch input ``tensor``."""

    tensor: str
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedStorage:
    """Memory that autograd keeps from a forward to its backward.

    Attributes:
        name: the tensor whose storage it is, or ``operator-name#k`` for memory no graph tensor owns
            (e.g. the log-sum-exp of attention).
        operators: indices of the operators whose backward needs it, ascending.
        size_bytes: size of the whole storage.
    """

    name: str
    operators: tuple[int, ...]
    size_bytes: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """A storage begins or ends while the whole model runs one microbatch forward and backward.

    Attributes:
        operator: index of the operator whose call it is; ``len(operators)`` for the loss.
        backward: whether in its backward.
        storage: name of the storage: that of the first tensor in it, or ``#k``.
        size_bytes: size of the whole storage.
        begins: whether it begins or ends.
    """

    operator: int
    backward: bool
    storage: str
    size_bytes: Size
    begins: bool


@dataclass(frozen=True, kw_only=True)
class ModelGraph:
    """A captured forward: operators in topological order and everything they read and make.

    Attributes:
        inputs: batch inputs, names in ``tensors``, in the order the program takes them.
        outputs: names of the output tensors, in the order of the model's flattened output.
        symbols: how each symbol gets its value from a batch.
        example: the symbols' values in the batch it was captured with.
        conditions: expressions that are not negative for any microbatch the graph is right for: the model
            may branch on shapes, and a norm needs more than one value.
        saved: what autograd keeps (empty until measured by :mod:`forescale.graph.saved`).
        memory: begin and end of every storage, in order (empty until measured likewise).
    """

    operators: tuple[Operator, ...]
    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Parameter]
    buffers: Mapping[str, Buffer]
    buffer_updates: tuple[BufferUpdate, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    symbols: Mapping[str, SymbolSource]
    example: Mapping[str, int]
    conditions: tuple[Size, ...] = ()
    saved: tuple[SavedStorage, ...] = ()
    memory: tuple[MemoryEvent, ...] = ()

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Values of the symbols in a batch.

        Args:
            shapes: shape of every batch input.

        Raises:
            InvalidInput: the batch has another number of axes than the captured one, differs from it
                in an axis the model fixes, or gives one symbol two values.
        """
        for name in self.inputs:
            if len(shapes[name]) != len(self.tensors[name].shape):
                raise InvalidInput(
                    f"batch input {name} has {len(shapes[name])} axes; "
                    f"the model was captured with {len(self.tensors[name].shape)}"
                )
        binding = {symbol: shapes[source.tensor][source.axis] for symbol, source in self.symbols.items()}
        for name in self.inputs:
            for axis, (size, found) in enumerate(zip(self.tensors[name].shape, shapes[name], strict=True)):
                wanted = binding.get(size) if isinstance(size, str) else size
                if wanted is not None and wanted != found:
                    raise InvalidInput(
                        f"axis {axis} of batch input {name} is {found}, but the model as captured needs "
                        f"{wanted} there; pad every batch to that size"
                    )
        return binding

    def part(self, binding: Mapping[str, int], rows: int, part_rows: int) -> dict[str, int]:
        """Binding of a microbatch of ``part_rows`` of the batch's ``rows`` rows.

        Raises:
            InvalidInput: the number of rows is a constant of the model.
        """
        counting = [s for s, value in binding.items() if self.symbols[s].axis == 0 and value == rows]
        if not counting and part_rows != rows:
            raise InvalidInput(
                f"the model as captured takes exactly {rows} rows, so a batch cannot be split into "
                "microbatches; len(x) or int(...) in its forward makes a size a constant, x.shape[0] does not"
            )
        return {**binding, **dict.fromkeys(counting, part_rows)}

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For every operator, the operators whose tensors it reads, ascending."""
        return tuple(
            tuple(sorted({p for name in operator.inputs if (p := self.tensors[name].producer) is not None}))
            for operator in self.operators
        )

    @cached_property
    def parameter_readers(self) -> Mapping[str, tuple[int, ...]]:
        """For every parameter, the operators that read it, ascending."""
        readers: dict[str, list[int]] = {name: [] for name in self.parameters}
        for operator in self.operators:
            for name in operator.parameters:
                readers[name].append(operator.index)
        return {name: tuple(indices) for name, indices in readers.items()}

    @cached_property
    def changing_buffers(self) -> Mapping[str, tuple[int, ...]]:
        """For every buffer that a forward changes, the operators that read or write it, ascending."""
        changing: dict[str, set[int]] = {u.buffer: set() for u in self.buffer_updates}
        for update in self.buffer_updates:
            if (producer := self.tensors[update.tensor].producer) is not None:
                changing[update.buffer].add(producer)
        for operator in self.operators:
            for name in operator.mutated_buffers:
                changing.setdefault(name, set())
        for operator in self.operators:
            for name in operator.buffers:
                if name in changing:
                    changing[name].add(operator.index)
        return {name: tuple(sorted(users)) for name, users in changing.items()}

    @cached_property
    def colocated(self) -> tuple[tuple[int, ...], ...]:
        """Groups of operators that must share a stage: readers and writers of one changing buffer."""
        return tuple(group for group in self.changing_buffers.values() if len(group) > 1)
