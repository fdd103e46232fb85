"""From an exported program to a :class:`~forescale.graph.model.ModelGraph`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from forescale.core.errors import CaptureFailed
from forescale.graph.model import BufferUpdate, ModelGraph, Operator, Size, SymbolSource, Tensor
from forescale.graph.node import (
    depends_on_data,
    draws_random_numbers,
    dtype_name,
    module_path,
    size_of,
    source,
    target_name,
)
from forescale.graph.program import compile_program
from forescale.graph.size import product
from forescale.graph.state import State, own_name

_CHECKS = {
    "aten._assert_scalar.default",
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default",
}
# Whether a reshape can be a view depends on strides, which the kernel chosen at run time decides.
_RESHAPES = {"aten.view.default", "aten._unsafe_view.default"}
_BATCH_NORMS = {
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit_no_training.default",
}


def translate(
    exported: ExportedProgram, model: nn.Module
) -> tuple[ModelGraph, Mapping[str, torch.Tensor], tuple[Any, ...]]:
    """Returns the graph, the values of its parameters and buffers, and the output's leaves."""
    state = State(model)
    state.bind(exported)
    reader = _Reader(exported=exported, state=state)
    reader.read()
    graph, leaves = reader.graph()
    return _with_gradients(graph, state.values), state.values, leaves


@dataclass(slots=True)
class _Value:
    """A graph tensor while it is being collected."""

    name: str
    shape: tuple[Size, ...]
    dtype: str
    producer: int | None
    consumers: list[int] = field(default_factory=list[int])


class _Reader:
    """Reads the nodes of an exported program in order."""

    def __init__(self, *, exported: ExportedProgram, state: State) -> None:
        self._exported = exported
        self._state = state
        self._operators: list[Operator] = []
        self._values: dict[str, _Value] = {}
        self._names: dict[str, str] = {}  # fx name -> tensor name
        self._inputs: list[str] = []
        self._updates: list[BufferUpdate] = []
        self._symbols: dict[str, SymbolSource] = {}
        self._example: dict[str, int] = {}
        self._conditions: dict[Size, None] = {}

    def read(self) -> None:
        for node in self._exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)

    def _placeholder(self, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        if node.name in self._state.placeholders or not isinstance(value, torch.Tensor):
            return
        sizes: tuple[Any, ...] = tuple(value.shape)
        for axis, size in enumerate(sizes):
            expression = size_of(size)
            if isinstance(expression, str) and expression.isidentifier() and expression not in self._symbols:
                self._symbols[expression] = SymbolSource(tensor=node.name, axis=axis)
                self._example[expression] = int(size.node.hint)
        self._add_value(node.name, value, None)
        self._inputs.append(node.name)

    def _add_value(self, fx_name: str, value: torch.Tensor, producer: int | None) -> str:
        shape = tuple(size_of(size) for size in value.shape)
        self._values[fx_name] = _Value(
            name=fx_name, shape=shape, dtype=dtype_name(value.dtype), producer=producer
        )
        self._names[fx_name] = fx_name
        return fx_name

    def _call(self, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        target = target_name(node)
        if target in _CHECKS or isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat, int, float)):
            return
        if target.endswith("getitem"):
            return  # folded into the outputs of its operator
        if not isinstance(node.target, torch._ops.OpOverload) or value is None:  # pyright: ignore[reportPrivateUsage] - its only name
            raise CaptureFailed(
                "this operator cannot be cut out of the model", operator=target, source=source(node)
            )
        if depends_on_data(value):
            raise CaptureFailed(
                "the size of its result depends on the values in a tensor",
                operator=target,
                source=source(node),
            )
        self._append(node, target, value)

    def _append(self, node: torch.fx.Node, target: str, value: Any) -> None:
        index = len(self._operators)
        args, kwargs = node.args, dict(node.kwargs)
        returns_tuple = isinstance(value, (tuple, list))
        outputs = self._outputs(node, index, value)
        changed: Sequence[Any] = ()
        if target in _BATCH_NORMS:
            # The functional form has no in-place statistics; batch_norm itself updates them, at eager speed.
            training = target == "aten._native_batch_norm_legit_functional.default"
            args = (*args[:5], *args[5:8], True) if training else (*args[:5], False, *args[5:7], True)
            target, returns_tuple, outputs = "aten.batch_norm.default", False, outputs[:1]
            changed = args[3:5] if training else ()
            self._need_two_values(args[0])
        elif (
            target == "aten.instance_norm.default" and args[5]
        ):  # its schema does not say that it changes them
            changed = args[3:5]
        if target in _RESHAPES:
            target = "aten.reshape.default"
        uses = _Uses(self)
        encoded = tuple(uses.encode(a, node) for a in args)
        encoded_kwargs = {k: uses.encode(v, node) for k, v in kwargs.items() if k != "pin_memory"}
        for name in uses.tensors:
            self._values[name].consumers.append(index)
        overload: Any = node.target
        self._operators.append(
            Operator(
                index=index,
                name=node.name,
                target=target,
                args=encoded,
                kwargs=encoded_kwargs,
                outputs=outputs,
                returns_tuple=returns_tuple,
                module_path=module_path(node),
                source=source(node),
                random=draws_random_numbers(overload, node),
                inputs=tuple(uses.tensors),
                parameters=tuple(uses.parameters),
                buffers=tuple(uses.buffers),
                mutated_buffers=tuple(
                    self._state.placeholders[a.name][1] for a in changed if isinstance(a, torch.fx.Node)
                ),
            )
        )

    def _need_two_values(self, normed: Any) -> None:
        """One value per channel has no variance; the kernel would put NaN into the running statistics."""
        sizes = [size_of(size) for axis, size in enumerate(normed.meta["val"].shape) if axis != 1]
        values = product(sizes)
        if isinstance(values, str):
            self._conditions[f"{values} - 2"] = None

    def _outputs(self, node: torch.fx.Node, index: int, value: Any) -> tuple[str | None, ...]:
        if isinstance(value, torch.Tensor):
            return (self._add_value(node.name, value, index),)
        names: list[str | None] = [None] * len(value)
        for user in node.users:
            position: Any = user.args[1]
            if target_name(user).endswith("getitem"):
                first = names[position]
                if first is None:
                    first = names[position] = self._add_value(user.name, user.meta["val"], index)
                self._names[user.name] = first
        return tuple(names)

    def tensor(self, node: torch.fx.Node) -> str:
        return self._names[node.name]

    def placeholder_kind(self, node: torch.fx.Node) -> tuple[str, str] | None:
        return self._state.placeholders.get(node.name)

    def graph(self) -> tuple[ModelGraph, tuple[Any, ...]]:
        output: Any = next(n for n in self._exported.graph.nodes if n.op == "output")
        leaves: list[Any] = []
        for node, spec in zip(output.args[0], self._exported.graph_signature.output_specs, strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                self._update(node, own_name(spec.target))
            elif spec.kind.name == "USER_OUTPUT":
                leaves.append(self._leaf(node))
            else:
                changed = own_name(spec.target) or spec.arg
                raise CaptureFailed(f"the forward changes {changed}, which training cannot carry over")
        if not any(isinstance(leaf, tuple) for leaf in leaves):
            raise CaptureFailed("the model's output holds no tensor")
        used = {name for o in self._operators for name in (*o.buffers,)}
        graph = ModelGraph(
            operators=tuple(self._operators),
            tensors={
                v.name: Tensor(
                    name=v.name,
                    producer=v.producer,
                    consumers=tuple(v.consumers),
                    shape=v.shape,
                    dtype=v.dtype,
                    requires_grad=False,
                )
                for v in self._values.values()
                if v.producer is None or v.name in self._operators[v.producer].outputs
            },
            parameters=self._state.parameters,
            buffers={n: b for n, b in self._state.buffers.items() if b.persistent or n in used},
            buffer_updates=tuple(self._updates),
            inputs=tuple(self._inputs),
            outputs=tuple(dict.fromkeys(leaf[0] for leaf in leaves if isinstance(leaf, tuple))),
            symbols=self._symbols,
            example=self._example,
            conditions=tuple(self._conditions),
        )
        return graph, tuple(leaves)

    def _update(self, node: torch.fx.Node, target: str) -> None:
        buffer = self._state.names[target]
        if node.name in self._names:  # absent: batch_norm updates it by itself
            tensor = self._names[node.name]
            producer = self._values[tensor].producer
            if producer is None or buffer not in self._operators[producer].mutated_buffers:
                self._updates.append(BufferUpdate(buffer=buffer, tensor=tensor))

    def _leaf(self, node: Any) -> Any:
        if not isinstance(node, torch.fx.Node):
            return node
        if (kind := self.placeholder_kind(node)) is not None:
            return (self._alias(kind, node),)
        return (self._names[node.name],)

    def _alias(self, kind: tuple[str, str], node: torch.fx.Node) -> str:
        """A parameter or buffer that is itself an output becomes the result of an operator."""
        index = len(self._operators)
        name = self._add_value(f"{node.name}_output", node.meta["val"], index)
        self._operators.append(
            Operator(
                index=index,
                name=name,
                target="aten.alias.default",
                args=({kind[0]: kind[1]},),
                kwargs={},
                outputs=(name,),
                returns_tuple=False,
                module_path="",
                source="",
                random=False,
                inputs=(),
                parameters=(kind[1],) if kind[0] == "parameter" else (),
                buffers=(kind[1],) if kind[0] == "buffer" else (),
                mutated_buffers=(),
            )
        )
        return name


class _Uses:
    """Encodes the arguments of one operator and remembers what they refer to."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self.tensors: dict[str, None] = {}
        self.parameters: dict[str, None] = {}
        self.buffers: dict[str, None] = {}

    def encode(self, value: Any, user: torch.fx.Node) -> Any:
        match value:
            case torch.fx.Node():
                return self._node(value, user)
            case list() | tuple():
                return [self.encode(v, user) for v in value]
            case torch.dtype():
                return {"dtype": dtype_name(value)}
            case torch.device():
                return {"device": None}
            case torch.layout() | torch.memory_format():
                kind = "layout" if isinstance(value, torch.layout) else "memory_format"
                return {kind: str(value).removeprefix("torch.")}
            case torch.SymInt():
                return {"size": size_of(value)}
            case torch.SymFloat():
                return {"number": str(value.node.expr)}
            case None | bool() | int() | float() | str():
                return value
            case _:
                raise CaptureFailed(
                    f"an argument of type {type(value).__name__} cannot be carried to another process",
                    operator=target_name(user),
                    source=source(user),
                )

    def _node(self, node: torch.fx.Node, user: torch.fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            size = size_of(value)
            return size if isinstance(size, int) else {"size": size}
        if isinstance(value, torch.SymFloat):
            return {"number": str(value.node.expr)}
        if isinstance(value, torch.SymBool):
            raise CaptureFailed(
                f"argument {value} is computed from the batch's shape",
                operator=target_name(user),
                source=source(user),
            )
        if (kind := self._reader.placeholder_kind(node)) is not None:
            (self.parameters if kind[0] == "parameter" else self.buffers)[kind[1]] = None
            return {kind[0]: kind[1]}
        name = self._reader.tensor(node)
        self.tensors[name] = None
        return {"tensor": name}


def _with_gradients(graph: ModelGraph, state: Mapping[str, torch.Tensor]) -> ModelGraph:
    """Runs the operators on fake tensors with autograd on, and notes which results carry a gradient."""
    made = [name for operator in graph.operators for name in operator.outputs if name]
    program = compile_program(graph, range(len(graph.operators)), made, torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with mode, torch.enable_grad():
        values = [mode.from_tensor(state[name]) for name in program.state]
        inputs = [
            torch.empty(
                [graph.example[s] if isinstance(s, str) else s for s in graph.tensors[name].shape],
                dtype=getattr(torch, graph.tensors[name].dtype),
            )
            for name in program.inputs
        ]
        results = program.function(values, inputs, program.sizes(graph.example), lambda _: None, True)
    for name, value in zip(made, results, strict=True):
        if type(value.grad_fn).__name__ == "NotImplemented":
            operator = graph.operators[graph.tensors[name].producer or 0]
            raise CaptureFailed("it has no derivative", operator=operator.target, source=operator.source)
    carries = {name: value.requires_grad for name, value in zip(made, results, strict=True)}
    tensors = {n: replace(t, requires_grad=carries.get(n, False)) for n, t in graph.tensors.items()}
    return replace(graph, tensors=tensors)
