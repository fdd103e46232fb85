"""How operators treat the factors of their operands: which go through them, and which they sum over.

An operator may run on a part of its operands along a factor that goes through it, and returns that part of
its results; run on a part along a factor that it sums over, it returns one term of its result. Operators
without a rule run on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import isqrt
from typing import Any

from forescale.core.errors import InvalidInput
from forescale.graph.factors import Axes, Axis, Factors, Unaligned
from forescale.graph.model import ModelGraph, Operator, Size
from forescale.graph.size import evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What one operator does with factors.

    Attributes:
        outputs: axes of its results.
        free: factors that go through it.
        summed: factors it sums over.
        added: argument that it adds to the sum (a bias).
        sizes: arguments that give sizes -> the axes they are of.
    """

    outputs: tuple[Axes, ...]
    free: Axis
    summed: Axis = ()
    added: int | None = None
    sizes: Mapping[int, Axes] = field(default_factory=dict[int, Axes])


def references(value: Any) -> Iterator[tuple[str, str]]:
    """The tensors, parameters and buffers in an argument, as pairs of kind and name."""
    if isinstance(value, Mapping):
        yield from ((k, n) for k, n in value.items() if k in ("tensor", "parameter", "buffer"))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from references(part)


def aten_name(operator: Operator) -> str:
    """``aten.add.Tensor`` -> ``add``; whatever is no ATen operator keeps its target."""
    return operator.target.split(".")[1] if operator.target.startswith("aten.") else operator.target


class Reading:
    """Reads a graph's operators in order and finds the factors of all axes.

    Args:
        rules: by operator, e.g. ``add``.

    Attributes:
        axes: of every tensor, parameter and buffer, by kind and name.
        flows: of every operator, None if it runs on whole tensors only.
    """

    def __init__(self, graph: ModelGraph, rules: Mapping[str, Rule]) -> None:
        self._rules = {o.target: rules[name] for o in graph.operators if (name := aten_name(o)) in rules}
        self.factors = Factors()
        self.axes: dict[tuple[str, str], Axes] = {}
        self.flows: list[Flow | None] = []
        self._graph = graph
        # A symbol stands for any number: a large prime of its own (with factors for what a model halves).
        self._binding = dict(zip(graph.symbols, (64 * p for p in _primes()), strict=False))
        self._numbers: dict[Size, int] = {}
        made = {"parameter": graph.parameters, "buffer": graph.buffers}
        self.axes |= {(kind, n): self._fresh(v.shape) for kind, vs in made.items() for n, v in vs.items()}
        self.axes |= {("tensor", n): self._fresh(graph.tensors[n].shape) for n in graph.inputs}
        for operator in graph.operators:
            self.flows.append(self._read(operator))

    def number(self, size: Size) -> int:
        """A size with primes for symbols."""
        if size not in self._numbers:
            try:
                self._numbers[size] = evaluate(size, self._binding)
            except InvalidInput:  # right for some batches only; then it is like no other size
                self._numbers[size] = 2**61 + len(self._numbers)
        return self._numbers[size]

    def shape(self, name: str) -> list[int]:
        return [self.number(size) for size in self._graph.tensors[name].shape]

    def _fresh(self, shape: Iterable[Size]) -> Axes:
        return tuple(self.factors.axis(self.number(size)) for size in shape)

    def _read(self, operator: Operator) -> Flow | None:
        made = {n: self._fresh(self._graph.tensors[n].shape) for n in operator.outputs if n}
        self.axes |= {("tensor", name): axes for name, axes in made.items()}
        rule = self._rules.get(operator.target)
        if rule is None or operator.random or any(references(list(operator.kwargs.values()))):
            return None
        try:
            operands = Operands(self, operator)
            flow = rule(operands)
            for name, axes in zip(operator.outputs, flow.outputs, strict=True):
                if name:
                    operands.join(axes, made[name])
        except (Unaligned, ArithmeticError, LookupError, TypeError, ValueError):
            return None  # its arguments are not those the rule is for: it runs on whole tensors
        return flow


def _primes() -> Iterator[int]:
    return (n for n in count(10_007, 2) if all(n % divisor for divisor in range(3, isqrt(n) + 1, 2)))


class Operands:
    """One operator's arguments, as its rule sees them."""

    def __init__(self, reading: Reading, operator: Operator) -> None:
        self.factors = reading.factors
        self.operator = operator
        self._reading = reading

    @property
    def name(self) -> str:
        return aten_name(self.operator)

    @property
    def shape(self) -> list[int]:
        """Of the first result that is read."""
        return self._reading.shape(next(n for n in self.operator.outputs if n))

    def given(self, position: int) -> bool:
        """Whether an argument is there and refers to a tensor, parameter or buffer."""
        return position < len(self.operator.args) and any(references(self.operator.args[position]))

    def axes(self, position: int) -> Axes:
        """Of the tensor that an argument is."""
        argument = self.operator.args[position] if position < len(self.operator.args) else None
        if not isinstance(argument, Mapping) or not any(references(argument)):
            raise Unaligned("no tensor where one was expected")
        return self._reading.axes[next(references(argument))]

    def every(self) -> list[Axes]:
        """Axes of all tensors in the arguments."""
        return [self._reading.axes[key] for key in references(self.operator.args)]

    def value(self, position: int, default: Any, keyword: str = "") -> Any:
        """An argument that is no tensor; sizes become numbers."""
        args = self.operator.args
        value = args[position] if position < len(args) else self.operator.kwargs.get(keyword, default)

        def plain(part: Any) -> Any:
            if isinstance(part, list):
                return [plain(p) for p in part]
            return (
                self._reading.number(part["size"]) if isinstance(part, Mapping) and "size" in part else part
            )

        return plain(value)

    def fresh(self, sizes: Iterable[int]) -> Axes:
        return tuple(self.factors.axis(size) for size in sizes)

    def join(self, one: Axes, other: Axes) -> None:
        if len(one) != len(other):
            raise Unaligned("operands of different ranks")
        for a, b in zip(one, other, strict=True):
            self.factors.join(a, b)

    def broadcast(self, operands: Sequence[Axes]) -> Axes:
        """The axes of what operands are together, aligned from the right."""
        rank = max(map(len, operands), default=0)
        found: list[Axis] = []
        for place in range(-rank, 0):
            axes = [o[place] for o in operands if len(o) >= -place and o[place]]
            for other in axes[1:]:
                self.factors.join(axes[0], other)
            found.append(axes[0] if axes else ())
        return tuple(found)


Rule = Callable[[Operands], Flow]
