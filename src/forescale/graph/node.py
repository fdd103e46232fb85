"""What one node of an exported program says about itself."""

from __future__ import annotations

import re
from typing import Any

import torch

from forescale.graph.model import Size


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_of(size: Any) -> Size:
    """A number, or the expression of a symbolic size."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


def depends_on_data(value: Any) -> bool:
    """Whether a result's shape holds a symbol that only running the operator gives a value."""
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    sizes = [
        s for t in tensors if isinstance(t, torch.Tensor) for s in t.shape if isinstance(s, torch.SymInt)
    ]
    return any(str(symbol).startswith("u") for size in sizes for symbol in size.node.expr.free_symbols)


def target_name(node: torch.fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage] - its only name
        return str(node.target)
    return getattr(node.target, "__name__", "")


def draws_random_numbers(overload: Any, node: torch.fx.Node) -> bool:
    if overload is torch.ops.aten.scaled_dot_product_attention.default:
        return len(node.args) > 4 and bool(node.args[4] != 0.0)
    return torch.Tag.nondeterministic_seeded in overload.tags


def module_path(node: torch.fx.Node) -> str:
    """Path of the user's module it came from."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return re.sub(r"@\d+$", "", path.removeprefix("model").removeprefix("."))


def source(node: torch.fx.Node) -> str:
    """``file:line``, of the user's code if the trace holds any."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    user = [f for f in found if "/torch/" not in f[0]] or found
    return f"{user[-1][0]}:{user[-1][1]}" if user else ""
