"""Captures a PyTorch model's training forward as a :class:`~forescale.graph.model.ModelGraph`.

The forward is traced by non-strict ``torch.export`` with every axis dynamic, then made functional, so
that it can be cut between any two operators. Where that fails, a model that is a chain of modules is cut
between whole modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from forescale.core.errors import CaptureFailed, InvalidInput
from forescale.graph.export import conditions, export
from forescale.graph.model import ModelGraph
from forescale.graph.modules import chain_of_modules
from forescale.graph.program import libraries_of
from forescale.graph.purity import refuse_memory
from forescale.graph.size import violated
from forescale.graph.translate import translate


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """Stands for a tensor of the graph in the model's output."""

    name: str


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """The model's output, with an :class:`OutputTensor` in place of every tensor."""

    template: Any

    @classmethod
    def of(cls, leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> OutputLayout:
        """From the leaves of an output, where a tensor's name is wrapped in a 1-tuple."""
        assert spec is not None, "torch.export always tells the output's structure"
        marked = [OutputTensor(*leaf) if isinstance(leaf, tuple) else leaf for leaf in leaves]
        return cls(pytree.tree_unflatten(marked, spec))

    def rebuild(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        return pytree.tree_map(
            lambda leaf: tensors[leaf.name] if isinstance(leaf, OutputTensor) else leaf, self.template
        )


@dataclass(frozen=True, slots=True)
class InputLayout:
    """How the parts of a call become the graph's inputs.

    Attributes:
        places: path of every tensor in ``(args, kwargs)`` -> graph input, in the graph's order.
        constants: path of everything else -> the value it had when the model was captured.
    """

    places: Mapping[str, str]
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[str]) -> InputLayout:
        leaves = _leaves(args, kwargs)
        tensors = [path for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)]
        return cls(
            places=dict(zip(tensors, inputs, strict=True)),
            constants={path: leaf for path, leaf in leaves.items() if path not in tensors},
        )

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The graph's inputs in a call.

        Raises:
            InvalidInput: the call has other parts than the captured one, or another constant.
        """
        leaves = _leaves(args, kwargs)
        for path in {**self.places, **self.constants, **leaves}:
            found, expected = leaves.get(path), path in self.places
            if isinstance(found, torch.Tensor) != expected:
                what = "lacks" if expected else "holds"
                raise InvalidInput(
                    f"a batch {what} the tensor {path}, unlike the batch the model was captured with; "
                    "all batches must have the same parts"
                )
            if not expected and found != self.constants.get(path):
                raise InvalidInput(
                    f"{path} is {found!r} in a batch, but the model was captured with "
                    f"{self.constants.get(path)!r}; make it a tensor if it changes"
                )
        return {name: leaves[path] for path, name in self.places.items()}


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a call but None, by where it is: ``args[0]``, ``mask`` or ``batch['ids']``."""
    flat: Any = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
    named: dict[str, Any] = {}
    for (half, part, *inner), leaf in flat:
        outer = f"args[{part.idx}]" if half.idx == 0 else str(part.key)
        if leaf is not None:
            named[outer + pytree.keystr(tuple(inner))] = leaf
    return named


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedModel:
    """A graph with what it takes to run it.

    Attributes:
        inputs: how a call becomes the graph's inputs.
        state: value of every parameter and buffer of the graph (shared with the model).
        output: how the model's output is rebuilt.
        modules: callables for whole-module operators (after a fall-back capture).
        libraries: Python modules to import before the graph's operators can be found.
    """

    graph: ModelGraph
    inputs: InputLayout
    state: Mapping[str, torch.Tensor]
    output: OutputLayout
    modules: Mapping[str, Callable[..., Any]]
    libraries: tuple[str, ...]

    def check(self, binding: Mapping[str, int]) -> None:
        """Checks that the graph is right for a microbatch.

        Raises:
            InvalidInput: the model takes another branch for this shape, or a norm has too few values.
        """
        if (condition := violated(self.graph.conditions, binding)) is not None:
            shape = ", ".join(
                f"axis {self.graph.symbols[s].axis} of {self.graph.symbols[s].tensor} is {value} ({s})"
                for s, value in binding.items()
            )
            raise InvalidInput(
                f"the model as captured is not right for a microbatch where {shape}: {condition} must not be "
                "negative; pad the batch, or change its number of rows"
            )


def flatten_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """All tensors of a call."""
    return [
        leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, torch.Tensor)
    ]


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    autocast: torch.dtype | None = None,
) -> CapturedModel:
    """Captures ``model(*args, **kwargs)`` as it runs in training mode.

    Args:
        model: is put into training mode, unless it is: then its inner modules keep the mode they have.
        args, kwargs: one example call; every axis of every tensor may differ later, unless the
            model itself ties it to a constant.
        autocast: captures the casts that ``torch.autocast`` with this dtype makes where the arguments lie;
            they stay the same wherever the graph runs.

    Raises:
        CaptureFailed: the forward depends on data, with the operator and source line.
    """
    if not model.training:
        model.train()
    args, kwargs = tuple(args), dict(kwargs or {})
    _refuse_parameter_hooks(model)
    try:
        exported = export(model, args, kwargs, autocast)
        graph, state, leaves = translate(exported, model)
        graph = replace(graph, conditions=(*conditions(exported), *graph.conditions))
        spec, modules = exported.call_spec.out_spec, {}
    except CaptureFailed as failed:
        try:
            refuse_memory(model, args, kwargs, autocast)
            chain = chain_of_modules(model, args, kwargs, autocast)
        except Exception:  # noqa: BLE001 - whatever hinders the second attempt, the first one is to be told of
            raise failed from None
        if chain is None:
            raise
        graph, state, leaves, spec = chain.graph, chain.state, chain.leaves, chain.spec
        modules = chain.modules
    return CapturedModel(
        graph=graph,
        inputs=InputLayout.of(args, kwargs, graph.inputs),
        state=state,
        output=OutputLayout.of(leaves, spec),
        modules=modules,
        libraries=libraries_of(graph),
    )


def _refuse_parameter_hooks(model: nn.Module) -> None:
    """Workers hold parameters of their own, without the hooks of the model's."""
    for name, parameter in model.named_parameters():
        hooks: Any = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)  # pyright: ignore[reportPrivateUsage] - its only name
        if any(hooks):
            raise CaptureFailed(f"the parameter {name} has a hook on its gradient; remove it")
