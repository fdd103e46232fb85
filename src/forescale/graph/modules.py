"""Captures a chain of modules whose inside cannot be traced, as operators that are whole modules.

A module is taken apart where its forward does nothing but call its children one after the other. Tracing
that forward alone, on no values at all, proves it: any branch on data or shape ends such a trace. The chain
found is then run beside the model, on the same random numbers, and must give the same result.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.func import functional_call

from forescale.graph.model import BufferUpdate, ModelGraph, Operator, Size, SymbolSource, Tensor
from forescale.graph.node import dtype_name
from forescale.graph.state import State

_ROWS = "rows"


class WholeModule:
    """A module as a function of its inputs, parameters and buffers.

    It returns the tensors of its output and then the new values of its buffers; nothing changes in place.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        buffers: Sequence[str],
        autocast: torch.dtype | None,
    ) -> None:
        self._module = _without_values(module)
        self._names = (*parameters, *buffers)
        self._buffers = tuple(buffers)
        self._autocast = autocast

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output, buffers = self.run(values)
        return (*(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), *buffers)

    def run(self, values: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        """The output as it is, and the buffers' new values."""
        count = len(values) - len(self._names)
        state = dict(zip(self._names, values[count:], strict=True))
        state |= {name: state[name].clone() for name in self._buffers}
        kind = values[0].device.type
        with torch.autocast(kind, self._autocast) if self._autocast else nullcontext():
            output = functional_call(self._module, state, tuple(values[:count]))
        return output, [state[name].detach() for name in self._buffers]


def _without_values(module: nn.Module) -> nn.Module:
    """A copy that holds no parameters or buffers, so that it is small to send."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        hollow = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
    return copy.deepcopy(module, memo)


@dataclass(frozen=True, slots=True)
class _Link:
    """One module of the chain: its path, and the names of its parameters and buffers, own -> in the graph."""

    path: str
    module: nn.Module
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model captured as a chain of modules; ``leaves`` and ``spec``: its output, names as 1-tuples."""

    graph: ModelGraph
    state: Mapping[str, torch.Tensor]
    modules: Mapping[str, Callable[..., Any]]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


def chain_of_modules(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None
) -> Chain | None:
    """The model as a chain of at least two modules, or None if it is none.

    Axes of size ``rows`` (of every input's axis 0) may change later; all others are fixed.
    """
    inputs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    hollow = _without_values(model)  # a trace may leave its marks in what it traces
    entry, paths = _entry(hollow), _paths(hollow, "")
    if entry is None or len(paths) < 2 or set(entry) != set(inputs):
        return None
    if not all(isinstance(value, torch.Tensor) and value.dim() for value in inputs.values()):
        return None
    state = State(model)
    links = [_link(model.get_submodule(path), path, state) for path in paths]
    buffers = [name for link in links for name in link.buffers.values()]
    if len(set(paths)) < len(paths) or len(set(buffers)) < len(buffers):
        return None  # the second call would have to see what the first did to a buffer
    reader = _Reader(links, entry, inputs, state, autocast)
    try:
        with torch.random.fork_rng([]):
            return (
                reader.chain()
                if _same(reader.run(inputs)[-1][0], _result(model, args, kwargs, autocast))
                else None
            )
    except _NoChain:
        return None


class _NoChain(Exception):
    """The modules are called one after the other, but what passes between them is not one tensor."""


def _result(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None
) -> Any:
    torch.manual_seed(0)
    kind = next(leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)))
    with torch.autocast(kind, autocast) if autocast else nullcontext():
        return copy.deepcopy(model)(*args, **kwargs)


def _same(a: Any, b: Any) -> bool:
    (leaves_a, spec_a), (leaves_b, spec_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec_a == spec_b and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


class _OneLevel(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - of fx.Tracer
        return True


def _calls(module: nn.Module) -> list[fx.Node]:
    """The calls of its children if its forward is nothing else; else none."""
    try:
        nodes = list(_OneLevel().trace(module).nodes)
    except Exception:  # noqa: BLE001 - its forward does whatever it likes with what is no tensor
        return []
    calls = [node for node in nodes if node.op == "call_module"]
    results = [node for node in nodes if node.op == "output"]
    if not calls or len(calls) + 1 != sum(node.op != "placeholder" for node in nodes):
        return []
    chained = all(b.args == (a,) and not b.kwargs for a, b in zip(calls, [*calls[1:], *results], strict=True))
    first = calls[0]
    starts = not first.kwargs and all(isinstance(a, fx.Node) and a.op == "placeholder" for a in first.args)
    return calls if chained and starts else []


def _entry(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the model's arguments, in the order its first module takes them."""
    calls = _calls(model)
    return tuple(str(argument.target) for argument in calls[0].all_input_nodes) if calls else None


def _paths(module: nn.Module, path: str) -> list[str]:
    calls = _calls(module)
    if not calls or (path and len(calls[0].args) != 1):
        return [path]
    prefix = f"{path}." if path else ""
    first = [f"{prefix}{calls[0].target}"] if len(calls[0].args) > 1 else None
    inner = [_paths(module.get_submodule(str(c.target)), f"{prefix}{c.target}") for c in calls]
    return [*(first or inner[0]), *(p for paths in inner[1:] for p in paths)]


def _link(module: nn.Module, path: str, state: State) -> _Link:
    def by_name(own: Mapping[str, torch.Tensor]) -> dict[str, str]:
        return {name: state.names[f"{path}.{name}"] for name in own}

    return _Link(
        path, module, by_name(dict(module.named_parameters())), by_name(dict(module.named_buffers()))
    )


class _Reader:
    """Runs the chain on an example, and writes down what it sees."""

    def __init__(
        self,
        links: Sequence[_Link],
        entry: Sequence[str],
        inputs: Mapping[str, torch.Tensor],
        state: State,
        autocast: torch.dtype | None,
    ) -> None:
        self._links, self._entry, self._inputs, self._state = links, entry, inputs, state
        self.modules = {
            f"module:{link.path}": WholeModule(
                link.module, tuple(link.parameters), tuple(link.buffers), autocast
            )
            for link in links
        }
        self._rows = next(iter(inputs.values())).shape[0]
        self._tensors: dict[str, Tensor] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[Any, list[torch.Tensor]]]:
        """Output and new buffers of every module, on the same random numbers each time."""
        torch.manual_seed(0)
        results: list[tuple[Any, list[torch.Tensor]]] = []
        values = [inputs[name] for name in self._entry]
        for link, whole in zip(self._links, self.modules.values(), strict=True):
            held = [self._state.values[name] for name in (*link.parameters.values(), *link.buffers.values())]
            results.append(whole.run([*values, *held]))
            values = [results[-1][0]]
        return results

    def chain(self) -> Chain:
        """The captured model; raises _NoChain if a module passes on something else than one tensor."""
        doubled = {n: torch.cat([t, t]) if self._rows == t.shape[0] else t for n, t in self._inputs.items()}
        once, twice = self.run(self._inputs), self.run(doubled)
        for name, value in self._inputs.items():
            self._note(name, None, value, doubled[name])
        operators: list[Operator] = []
        updates: list[BufferUpdate] = []
        names = list(self._entry)
        for index, link in enumerate(self._links):
            made = self._outputs(index, link.path, once[index][0], twice[index][0])
            new = {f"{link.path}:{own}": name for own, name in link.buffers.items()}
            for tensor, value in zip(new, once[index][1], strict=True):
                self._note(tensor, index, value, value)
            updates += [BufferUpdate(buffer=name, tensor=tensor) for tensor, name in new.items()]
            operators.append(_operator(index, link, names, (*made, *new)))
            names = made
        leaves, spec = pytree.tree_flatten(once[-1][0])
        left = iter(names)
        return Chain(
            graph=ModelGraph(
                operators=tuple(operators),
                tensors=self._with_consumers(operators),
                parameters=self._state.parameters,
                buffers=self._state.buffers,
                buffer_updates=tuple(updates),
                inputs=tuple(self._inputs),
                outputs=tuple(names),
                symbols={_ROWS: SymbolSource(tensor=next(iter(self._inputs)), axis=0)},
                example={_ROWS: self._rows},
                conditions=self._conditions(),
            ),
            state=self._state.values,
            modules=self.modules,
            leaves=tuple((next(left),) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
            spec=spec,
        )

    def _conditions(self) -> tuple[str, ...]:
        """Whether one row is enough (it is not for BatchNorm)."""
        try:
            self.run({n: t[:1] if t.shape[0] == self._rows else t for n, t in self._inputs.items()})
        except Exception:  # noqa: BLE001 - a model complains as it likes
            return (f"{_ROWS} - 2",)
        return ()

    def _outputs(self, index: int, path: str, once: Any, twice: Any) -> list[str]:
        if index + 1 < len(self._links) and not isinstance(once, torch.Tensor):
            raise _NoChain
        tensors = [leaf for leaf in pytree.tree_leaves(once) if isinstance(leaf, torch.Tensor)]
        others = [leaf for leaf in pytree.tree_leaves(twice) if isinstance(leaf, torch.Tensor)]
        names = [path if position == 0 else f"{path}#{position}" for position in range(len(tensors))]
        for name, value, other in zip(names, tensors, others, strict=True):
            self._note(name, index, value, other)
        return names

    def _note(self, name: str, producer: int | None, value: torch.Tensor, twice: torch.Tensor) -> None:
        if value.dim() != twice.dim():
            raise _NoChain
        self._tensors[name] = Tensor(
            name=name,
            producer=producer,
            consumers=(),
            shape=tuple(self._size(a, b) for a, b in zip(value.shape, twice.shape, strict=True)),
            dtype=dtype_name(value.dtype),
            requires_grad=value.requires_grad,
        )

    def _size(self, once: int, twice: int) -> Size:
        """What becomes of an axis when the rows double."""
        if once == twice:
            return once
        if twice != 2 * once or once % self._rows:
            raise _NoChain
        return _ROWS if once == self._rows else f"{once // self._rows}*{_ROWS}"

    def _with_consumers(self, operators: Sequence[Operator]) -> dict[str, Tensor]:
        readers: dict[str, list[int]] = {name: [] for name in self._tensors}
        for operator in operators:
            for name in operator.inputs:
                readers[name].append(operator.index)
        return {
            name: replace(tensor, consumers=tuple(readers[name])) for name, tensor in self._tensors.items()
        }


def _operator(index: int, link: _Link, inputs: Sequence[str], outputs: tuple[str, ...]) -> Operator:
    code = type(link.module).forward.__code__
    parameters, buffers = tuple(link.parameters.values()), tuple(link.buffers.values())
    return Operator(
        index=index,
        name=link.path,
        target=f"module:{link.path}",
        args=(
            *({"tensor": name} for name in inputs),
            *({"parameter": name} for name in parameters),
            *({"buffer": name} for name in buffers),
        ),
        kwargs={},
        outputs=outputs,
        returns_tuple=True,
        module_path=link.path,
        source=f"{code.co_filename}:{code.co_firstlineno}",
        random=True,  # it may be
        inputs=tuple(dict.fromkeys(inputs)),
        parameters=parameters,
        buffers=buffers,
        mutated_buffers=(),
    )
