"""Traces a model's training forward with ``torch.export`` into functional operators.

Things the export would silently get wrong are put right or refused here: assigned buffers are lost,
gradients flow through ``no_grad`` regions but not through reentrant checkpoints, and a custom
``autograd.Function`` or a hook on a gradient is forgotten.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.utils.checkpoint import CheckpointFunction

from forescale.core.errors import CaptureFailed
from forescale.graph.purity import Attributes, refuse_memory


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None
) -> ExportedProgram:
    """Exports ``model(*args, **kwargs)``; names in the result begin with ``model.``.

    Raises:
        CaptureFailed: the forward cannot be traced; names the operator and the user's line if it can.
    """

    def dynamic(leaf: Any) -> Any:
        return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None

    args, kwargs = _as_fed(args, kwargs)
    shapes = (pytree.tree_map(dynamic, args), pytree.tree_map(dynamic, kwargs))
    kind = next(t.device.type for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    # Casts of a cached weight would be shared by distant operators, and so cross cuts as whole weights.
    casting = torch.autocast(kind, autocast, cache_enabled=False) if autocast else nullcontext()
    _refuse_backward_hooks(model)
    attributes = Attributes(model)
    with casting, _quiet(), _no_custom_backward(), _no_hooks(), _no_look_at_masks():
        try:
            exported = torch.export.export(
                _Traced(model, attributes), (args, kwargs), dynamic_shapes=shapes, strict=False
            )
            attributes.restore()
            if attributes.changed:
                refuse_memory(model, args, kwargs, autocast, attributes.changed)
            _inline_no_grad(exported)
            return exported.run_decompositions({torch.ops.aten.copy.default: _copy})
        except CaptureFailed:
            raise
        except Exception as error:  # torch.export raises many kinds, and the model's own errors
            raise _capture_failed(error) from error
        finally:
            attributes.restore()


class _Traced(nn.Module):
    """The model with only tensors, numbers and their standard containers in its output.

    ``transformers`` models return caches by default, which training has no use for.
    """

    def __init__(self, model: nn.Module, attributes: Attributes) -> None:
        super().__init__()
        self.model = model
        self._attributes = attributes

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = dict(self.model.named_buffers(remove_duplicate=False))
        try:
            output = self.model(*args, **kwargs)
            self._attributes.look()  # now, because torch.export restores attributes
            for name, buffer in before.items():
                # Turns ``self.buffer = value`` into a change of the tensor, which the export does not lose.
                if (assigned := self.model.get_buffer(name)) is not buffer:
                    buffer.copy_(assigned.detach())
        finally:
            for name, buffer in before.items():
                path, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(path), last, buffer)
        kept = (torch.Tensor, bool, int, float, str)
        return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, kept) else None, output)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:  # noqa: ARG001 - the operator's signature
    """``aten.copy`` has no derivative; what it is made of has."""
    return source.to(target.dtype).expand_as(target)


def _as_fed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as a worker will see a batch: contiguous, and with at least two rows.

    Other strides would become conditions of the export, and an axis of size 1 a constant.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    double = any(t.dim() and t.shape[0] == 1 for t in tensors)

    def fed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().contiguous()
        return torch.cat([leaf, leaf]) if double and leaf.dim() and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(fed, (args, kwargs))


@contextmanager
def _quiet() -> Generator[None]:
    """Keeps torch's remarks about its internals, and its prints of half a graph, from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _no_custom_backward() -> Generator[None]:
    """Refuses the user's ``autograd.Function`` s: the export records what their forward does, and no more.

    Of torch's own, checkpoints are left out: what to recompute is the plan's decision.
    """
    function: Any = torch.autograd.Function
    original = function.apply.__func__

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return _without_checkpoint(*args)
        if not cls.__module__.startswith("torch."):
            caller = inspect.stack(0)[1]
            raise CaptureFailed(
                "an autograd.Function has a backward of its own",
                operator=cls.__name__,
                source=f"{caller.filename}:{caller.lineno}",
            )
        return original(cls, *args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = classmethod(original)


def _without_checkpoint(function: Any, preserve_rng_state: bool, *args: Any) -> Any:  # noqa: ARG001 - as CheckpointFunction
    """A reentrant checkpoint gives no gradient at all unless one of its arguments carries one."""
    carries = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    with nullcontext() if carries else torch.no_grad():
        return function(*args)


def _refuse_backward_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:  # pyright: ignore[reportPrivateUsage] - their only names
            raise CaptureFailed(f"the module {name or 'itself'} has a backward hook; remove it")


@contextmanager
def _no_hooks() -> Generator[None]:
    """Refuses hooks on gradients that the forward sets."""
    original = torch.Tensor.register_hook

    def register_hook(self: torch.Tensor, hook: Any) -> Any:  # noqa: ARG001 - the method's signature
        caller = inspect.stack(0)[1]
        raise CaptureFailed(
            "a hook on a tensor's gradient",
            operator="register_hook",
            source=f"{caller.filename}:{caller.lineno}",
        )

    torch.Tensor.register_hook = register_hook
    try:
        yield
    finally:
        torch.Tensor.register_hook = original


@contextmanager
def _no_look_at_masks() -> Generator[None]:
    """Keeps ``nn.Transformer`` from comparing its mask with a causal one, to leave it out if they agree."""
    transformer: Any = torch.nn.modules.transformer
    original = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True  # noqa: ARG005
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = original


def _capture_failed(error: Exception) -> CaptureFailed:
    text = str(error).strip() or type(error).__name__
    reason = text.splitlines()[0].split(". ")[0]
    operator = str(getattr(error, "func", "")) or None
    if "data-dependent" in reason:
        reason = (
            "control flow depends on the values in a tensor; use torch.where, or move it out of the model"
        )
        operator = _decisive_operator(str(getattr(error, "partial_fx_graph", ""))) or operator
    return CaptureFailed(reason, operator=operator, source=_user_line(error))


def _decisive_operator(code: str) -> str | None:
    """The last operator traced before Python asked for the value of its result."""
    asking = ("aten.item.default", "aten._local_scalar_dense.default", "aten.ne.Scalar")
    called = [name for name in re.findall(r"torch\.ops\.([\w.]+)\(", code) if name not in asking]
    return called[-1] if called else None


def _user_line(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame of an error that is neither torch's nor ours."""
    found: str | None = None
    trace = error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/forescale/graph/" not in file and not file.startswith("<"):
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


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
            results: Any = module.graph.graph_copy(inner.graph, mapping)
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


def conditions(exported: ExportedProgram) -> tuple[str, ...]:
    """What a shape must fulfil to take the path through the forward that was traced.

    Returns:
        Expressions over the graph's symbols; none of them is negative for such a shape. Conditions that
        only tell an axis of size 1 from larger ones are left out: every operator broadcasts it rightly.
    """
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None or mode.shape_env is None:
        return ()
    found: dict[str, None] = {}
    for guard in mode.shape_env.guards:
        relation = mode.shape_env.replace(guard.expr)  # symbols that proved equal to others are gone
        kind, sides = type(relation).__name__, relation.args
        if kind not in _ORDERS and kind != "Equality":
            continue
        strict = kind.startswith("Strict")
        small, large = sides if kind.endswith("LessThan") else reversed(sides)
        slack = f"-Abs({sides[0]} - ({sides[1]}))" if kind == "Equality" else f"{large} - ({small})"
        if not all(side.is_integer for side in sides):
            slack = f"ceiling({slack})" if strict else f"floor({slack})"
        if kind == "Equality" or not (small.is_number and small + strict <= 2):
            found[slack + (" - 1" if strict else "")] = None
    return tuple(found)


_ORDERS = ("LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan")
