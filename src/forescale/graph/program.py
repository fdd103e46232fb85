"""Turns operators of a graph back into a Python function.

One straight-line function is generated per stage: no interpreter loop in the hot path, every value
is dropped after its last use, and what depends on the batch's shape is passed in as integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS

from forescale.core.errors import InvalidInput
from forescale.graph.model import ModelGraph, Operator
from forescale.graph.size import compile_numbers, compile_sizes

Reseed = Callable[[int], None]
"""Called with an operator's index before a random operator draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Compiled operators.

    Attributes:
        inputs: tensors it needs from outside, batch inputs included, in call order.
        state: parameters and buffers it reads, in call order.
        outputs: tensors it returns, in order.
        function: ``function(state, inputs, sizes, reseed, track) -> tuple of outputs``; ``track`` False
            leaves buffers that operators change in place untouched (for a recomputation).
        sizes: binding of the graph's symbols -> the sizes (and other numbers) ``function`` takes.
    """

    inputs: tuple[str, ...]
    state: tuple[str, ...]
    outputs: tuple[str, ...]
    function: Callable[..., tuple[torch.Tensor, ...]]
    sizes: Callable[[Mapping[str, int]], Sequence[float]]
    source: str


def libraries_of(graph: ModelGraph) -> tuple[str, ...]:
    """Modules that register operators of the graph which are not PyTorch's own."""
    names = {o.target.rpartition(".")[0].replace(".", "::", 1) for o in graph.operators}
    makers: list[Any] = [OPDEFS[name]._init_fn for name in sorted(names) if name in OPDEFS]  # pyright: ignore[reportPrivateUsage]
    defined = [maker.__module__ for maker in makers]
    return tuple(dict.fromkeys(module for module in defined if not module.startswith("torch.")))


def register_operators(libraries: Iterable[str]) -> None:
    """Imports the modules that :func:`libraries_of` found in another process.

    Raises:
        InvalidInput: one of them cannot be imported.
    """
    for library in libraries:
        try:
            import_module(library)
        except ImportError as error:
            raise InvalidInput(
                f"the model calls operators of {library}, which a worker cannot import: {error}; "
                "move them into a module on the Python path"
            ) from error


def resolve_target(target: str) -> Callable[..., Any]:
    """``aten.linear.default`` -> the operator.

    Raises:
        InvalidInput: the operator is not registered in this process.
    """
    found: Any = torch.ops
    try:
        for part in target.split("."):
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        raise InvalidInput(
            f"operator {target} is not registered here; import the library that defines it in the task file"
        ) from error
    return found


def compile_program(
    graph: ModelGraph,
    operators: Sequence[int],
    outputs: Sequence[str],
    device: torch.device,
    modules: Mapping[str, Callable[..., Any]] | None = None,
    wraps: Mapping[int, Callable[[Callable[..., Any]], Callable[..., Any]]] | None = None,
) -> Program:
    """Generates and compiles the function for ``operators`` (run in ascending order).

    Args:
        outputs: tensors to return; each is made by one of ``operators`` or is an input.
        device: where tensors that operators create (``arange``, ``full``, ...) are placed.
        modules: callables for ``module:PATH`` targets, see :mod:`forescale.graph.modules`, and for
            ``collective:KIND``, see :mod:`forescale.graph.sharding`.
        wraps: by index of an operator, what makes the function to call instead of its own.
    """
    writer = _Writer(graph=graph, device=device, modules=modules or {}, wraps=wraps or {})
    return writer.program(sorted(operators), tuple(outputs))


class _Writer:
    def __init__(
        self,
        *,
        graph: ModelGraph,
        device: torch.device,
        modules: Mapping[str, Callable[..., Any]],
        wraps: Mapping[int, Callable[[Callable[..., Any]], Callable[..., Any]]],
    ) -> None:
        self._graph = graph
        self._modules = modules
        self._wraps = wraps
        self._namespace: dict[str, Any] = {"device": device}
        self._names: dict[tuple[str, str], str] = {}
        self._sizes: dict[str, str] = {}  # expression -> its name in the function
        self._numbers: dict[str, str] = {}

    def program(self, indices: Sequence[int], outputs: tuple[str, ...]) -> Program:
        operators = [self._graph.operators[index] for index in indices]
        made = {name for operator in operators for name in operator.outputs if name}
        read = [name for operator in operators for name in operator.inputs]
        inputs = tuple(dict.fromkeys(n for n in (*read, *outputs) if n not in made))
        state = tuple(dict.fromkeys(n for o in operators for n in (*o.parameters, *o.buffers)))
        last_use = {
            name: position for position, o in enumerate(operators) for name in (*o.outputs, *o.inputs) if name
        }
        lines: list[str] = []
        for position, operator in enumerate(operators):
            lines += self._call(operator)
            touched = dict.fromkeys(n for n in (*operator.inputs, *operator.outputs) if n)
            dead = [self._local("t", n) for n in touched if last_use[n] == position and n not in outputs]
            if dead:
                lines.append("del " + ", ".join(dead))
        source = "\n    ".join(
            [
                "def forward(state, inputs, sizes, reseed, track):",
                *self._unpack("state", [self._local("s", n) for n in state]),
                *self._unpack("inputs", [self._local("t", n) for n in inputs]),
                "del inputs",
                *self._unpack("sizes", [*self._sizes.values(), *self._numbers.values()]),
                *lines,
                "return (" + "".join(self._local("t", n) + ", " for n in outputs) + ")",
            ]
        )
        exec(compile(source, "<stage>", "exec"), self._namespace)  # noqa: S102 - our own generated code
        return Program(
            inputs=inputs,
            state=state,
            outputs=outputs,
            function=self._namespace["forward"],
            sizes=self._compiled_sizes(),
            source=source,
        )

    def _compiled_sizes(self) -> Callable[[Mapping[str, int]], Sequence[float]]:
        symbols = tuple(self._graph.symbols)
        sizes = compile_sizes(tuple(self._sizes), symbols)
        if not self._numbers:
            return sizes
        numbers = compile_numbers(tuple(self._numbers), symbols)
        return lambda binding: [*sizes(binding), *numbers(binding)]

    @staticmethod
    def _unpack(sequence: str, names: Sequence[str]) -> list[str]:
        return [f"({', '.join(names)},) = {sequence}"] if names else []

    def _local(self, kind: str, name: str) -> str:
        return self._names.setdefault((kind, name), f"{kind}{len(self._names)}")

    def _call(self, operator: Operator) -> list[str]:
        lines = [f"reseed({operator.index})"] if operator.random else []
        function = f"f{operator.index}"
        if operator.target.startswith(("module:", "collective:")):
            self._namespace[function] = self._modules[operator.target]
        else:
            self._namespace[function] = resolve_target(operator.target)
        if wrap := self._wraps.get(operator.index):
            self._namespace[function] = wrap(self._namespace[function])
        arguments = [self._expression(a, operator) for a in operator.args]
        arguments += [f"{k}={self._expression(v, operator)}" for k, v in operator.kwargs.items()]
        targets = [self._local("t", name) if name else "_" for name in operator.outputs]
        left = f"({', '.join(targets)},)" if operator.returns_tuple else targets[0]
        return [*lines, f"{left} = {function}({', '.join(arguments)})"]

    def _expression(self, value: Any, operator: Operator) -> str:
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self._expression(v, operator) for v in value) + "]"
        if isinstance(value, dict):
            ((kind, what),) = value.items()
            return self._reference(kind, what, operator)
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        return repr(value)

    def _reference(self, kind: str, what: Any, operator: Operator) -> str:
        match kind:
            case "tensor":
                return self._local("t", what)
            case "parameter":
                return self._local("s", what)
            case "buffer":
                name = self._local("s", what)
                # A recomputation must not count the batch twice in the running statistics.
                return f"({name} if track else None)" if what in operator.mutated_buffers else name
            case "size":
                return self._sizes.setdefault(what, f"z{len(self._sizes)}")
            case "number":
                return self._numbers.setdefault(what, f"n{len(self._numbers)}")
            case "device":
                return "device"
            case "dtype" | "layout" | "memory_format":
                self._namespace[what] = getattr(torch, what)
                return what
            case _:
                raise InvalidInput(f"unknown argument kind {kind!r} in operator {operator.name}")
