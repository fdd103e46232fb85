"""Captures a PyTorch model's training forward as a :class:`~forescale.graph.model.ModelGraph`.

The forward is traced by non-strict ``torch.export`` with every axis dynamic, then made functional, so
that it can be cut between any two operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim, ExportedProgram

from forescale.core.errors import CaptureFailed
from forescale.graph.model import ModelGraph
from forescale.graph.translate import translate


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """Stands for a tensor of the graph in the model's output."""

    name: str


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """The model's output, with an :class:`OutputTensor` in place of every tensor."""

    template: Any

    def rebuild(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        return pytree.tree_map(
            lambda leaf: tensors[leaf.name] if isinstance(leaf, OutputTensor) else leaf, self.template
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedModel:
    """A graph with what it takes to run it.

    Attributes:
        state: value of every parameter and buffer of the graph (shared with the model).
        output: how the model's output is rebuilt.
        modules: callables for whole-module operators (after a fall-back capture).
    """

    graph: ModelGraph
    state: Mapping[str, torch.Tensor]
    output: OutputLayout
    modules: Mapping[str, nn.Module]


def flatten_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tensors of a call in the order of ``graph.inputs``."""
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
        args, kwargs: one example call; every axis of every tensor may differ later, unless the
            model itself ties it to a constant.
        autocast: captures the casts that ``torch.autocast`` with this dtype makes.

    Raises:
        CaptureFailed: the forward depends on data, with the operator and source line.
    """
    if not model.training:
        model.train()  # else it is the user's choice which of its modules train
    args, kwargs = _as_fed(tuple(args), dict(kwargs or {}))
    exported = _export(_PlainOutput(model), args, kwargs, autocast)
    return translate_captured(exported, model)


def translate_captured(exported: ExportedProgram, model: nn.Module) -> CapturedModel:
    graph, state, leaves = translate(exported, model)
    spec = exported.call_spec.out_spec
    if spec is None:
        raise CaptureFailed("the model returns nothing")
    template = pytree.tree_unflatten(
        [OutputTensor(*leaf) if isinstance(leaf, tuple) else leaf for leaf in leaves], spec
    )
    return CapturedModel(graph=graph, state=state, output=OutputLayout(template), modules={})


class _PlainOutput(nn.Module):
    """The model with only tensors, numbers and their standard containers in its output.

    ``transformers`` models return caches by default, which training has no use for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self.model(*args, **kwargs)
        kept = (torch.Tensor, bool, int, float, str)
        return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, kept) else None, output)


def _as_fed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as a worker will see a batch: contiguous, and with at least two rows.

    Other strides would become conditions of the export, as would an axis of size 1.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    double = any(t.dim() and t.shape[0] == 1 for t in tensors)

    def fed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().contiguous()
        return torch.cat([leaf, leaf]) if double and leaf.dim() and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(fed, (args, kwargs))


def _export(
    wrapped: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None
) -> ExportedProgram:
    def dynamic(leaf: Any) -> Any:
        return {axis: Dim.AUTO for axis in range(leaf.dim())} if isinstance(leaf, torch.Tensor) else None

    shapes = (pytree.tree_map(dynamic, args), pytree.tree_map(dynamic, kwargs))
    # Casts of a cached weight would be shared by distant operators, and so cross cuts as whole weights.
    casting = torch.autocast("cpu", autocast, cache_enabled=False) if autocast else nullcontext()
    with casting, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals while exporting
        try:
            exported = torch.export.export(wrapped, (args, kwargs), dynamic_shapes=shapes, strict=False)
            _inline_no_grad(exported)
            return exported.run_decompositions({})
        except Exception as error:  # torch.export raises many kinds, and the model's own errors
            raise _capture_failed(error) from error


def _capture_failed(error: Exception) -> CaptureFailed:
    frames = [f for f in _frames(error) if "/torch/" not in f[0] and f[2] == "forward"]
    source = f"{frames[-1][0]}:{frames[-1][1]}" if frames else None
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "data-dependent" in reason:
        reason = (
            "control flow depends on the values in a tensor; use torch.where, or move it out of the model"
        )
    return CaptureFailed(reason, operator=getattr(error, "operator", None), source=source)


def _frames(error: Exception) -> list[tuple[str, int, str]]:
    frames: list[tuple[str, int, str]] = []
    trace = error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return frames


def _inline_no_grad(exported: ExportedProgram) -> None:
    """Replaces ``no_grad`` regions by their operators, detached where they leave the region.

    ``run_decompositions`` inlines such regions too, but forgets that no gradient flows through them.
    """
    module = exported.graph_module
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        enabled, body, *operands = node.args
        inner: torch.fx.GraphModule = getattr(module, body.target)
        if enabled:
            raise CaptureFailed("torch.enable_grad inside torch.no_grad is not supported")
        mapping: dict[torch.fx.Node, Any] = {}
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        mapping.update(zip(placeholders, operands, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, mapping)
            detached = [_detach(module.graph, r) for r in results]
        for user in list(node.users):
            user.replace_all_uses_with(detached[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _detach(graph: torch.fx.Graph, value: Any) -> Any:
    if not isinstance(value, torch.fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node
