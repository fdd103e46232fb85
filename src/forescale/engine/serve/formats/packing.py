"""Weights of a program's linear layers, laid out once as oneDNN multiplies them.

torch hands CPU matrices to a BLAS that lays a weight out anew for every batch. Laid out beforehand, as
``torch.compile`` does with frozen weights (``torch/_inductor/fx_passes/mkldnn_fusion.py``), batches of 2 to
512 rows took 0.3 to 0.8 of the time, measured on a CPU with AVX-512.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, fx

_LEAST_VALUES = 1 << 15  # of a weight: a call takes 10 µs more, which smaller ones do not win back


def pack(program: fx.GraphModule) -> None:
    """Lay out the float32 weights that only linear layers use, in place; answers differ by rounding.

    Args:
        program: on a CPU, of ``ExportedProgram.module()``.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return
    onednn: Any = torch.ops.mkldnn
    if not torch.backends.mkl.is_available() and not onednn._is_mkldnn_acl_supported():
        return  # as ``torch.compile``: there oneDNN has no kernels of its own
    _drop_unused(program)
    for weight in program.graph.find_nodes(op="get_attr"):
        values = _attribute(program, weight)
        calls = list(weight.users)
        if not isinstance(values, torch.Tensor):
            continue  # the program of a branch
        is_large = values.dtype is torch.float32 and values.numel() >= _LEAST_VALUES
        if not is_large or not all(_is_packable(program, call, weight) for call in calls):
            continue
        _replace(program, weight, onednn._reorder_linear_weight(values.detach()))
        for call in calls:
            x, _, *bias = call.args
            call.target = onednn._linear_pointwise.default
            call.args = (x, weight, bias[0] if bias else None, "none", [], "")
    program.recompile()


def _is_packable(program: fx.GraphModule, call: fx.Node, weight: fx.Node) -> bool:
    import torch
    from torch import fx

    if call.target is not torch.ops.aten.linear.default or call.args.index(weight) != 1:
        return False
    bias = call.args[2] if len(call.args) > 2 else None
    # oneDNN takes a bias's values to be side by side, and does not check.
    return bias is None or (
        isinstance(bias, fx.Node)
        and bias is not weight
        and bias.op == "get_attr"
        and _attribute(program, bias).is_contiguous()
    )


def _drop_unused(program: fx.GraphModule) -> None:
    """Other names of a weight, which would keep its former layout in memory."""
    for node in program.graph.find_nodes(op="get_attr"):
        if not node.users:
            _replace(program, node, None)
            program.graph.erase_node(node)


def _attribute(program: fx.GraphModule, node: fx.Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(program.get_submodule(owner), name)


def _replace(program: fx.GraphModule, node: fx.Node, values: Tensor | None) -> None:
    owner, _, name = str(node.target).rpartition(".")
    module = program.get_submodule(owner)
    delattr(module, name)
    if values is not None:
        module.register_buffer(name, values)
