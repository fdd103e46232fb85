"""Which factors go through every operator, and which it sums over: see :mod:`forescale.graph.flows`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forescale.graph.factors import Axes, Axis, Unaligned
from forescale.graph.flows import Flow, Operands, Rule


def flat(axes: Iterable[Axis]) -> Axis:
    return tuple(factor for axis in axes for factor in axis)


def _through(o: Operands, outputs: Axes, kept: Iterable[Axis] | None = None, **more: Any) -> Flow:
    """All results alike; ``kept``: axes that go through, all if it is None."""
    free = flat(outputs if kept is None else kept)
    return Flow(outputs=(outputs,) * len(o.operator.outputs), free=free, **more)


def _elementwise(o: Operands) -> Flow:
    return _through(o, o.broadcast(o.every()))


def _linear(o: Operands) -> Flow:
    x, weight = o.axes(0), o.axes(1)
    o.join(x[-1:], weight[1:])
    if o.given(2):
        o.join(o.axes(2), weight[:1])
    return _through(o, (*x[:-1], weight[0]), summed=x[-1], added=2 if o.given(2) else None)


def _matmul(first: int) -> Rule:
    """Products of matrices, the left one being argument ``first``; one before it is added."""

    def rule(o: Operands) -> Flow:
        left, right = o.axes(first), o.axes(first + 1)
        if min(len(left), len(right)) < 2 or (first and o.operator.kwargs):
            raise Unaligned("vectors, or factors of the two terms")
        o.factors.join(left[-1], right[-2])
        outputs = (*o.broadcast([left[:-2], right[:-2]]), left[-2], right[-1])
        if first:
            o.broadcast([outputs, o.axes(0)])
        return _through(o, outputs, summed=left[-1], added=0 if first else None)

    return rule


def _attention(o: Operands) -> Flow:
    query, key, value = o.axes(0), o.axes(1), o.axes(2)
    if o.value(7, default=False, keyword="enable_gqa"):  # each head of a key serves several of the query
        heads, served = key[-3], o.factors.axis(o.factors.size(query[-3]) // o.factors.size(key[-3]))
        o.factors.join(query[-3], (*heads, *served))
        o.join((*key[:-3], heads), value[:-2])
        o.broadcast([query[:-3], key[:-3]])
        batch = query[:-2]
    else:
        batch = o.broadcast([query[:-2], key[:-2], value[:-2]])
    o.factors.join(query[-1], key[-1])
    o.factors.join(key[-2], value[-2])
    if o.given(3):
        o.broadcast([(*batch, query[-2], key[-2]), o.axes(3)])
    return _through(o, (*batch, query[-2], value[-1]), batch)


def _einsum(o: Operands) -> Flow:
    inputs, _, output = str(o.value(0, "")).replace(" ", "").partition("->")
    labels: dict[str, Axis] = {}
    for term, axes in zip(inputs.split(","), o.every(), strict=True):
        if len(set(term)) < len(axes) or not term.isalpha():
            raise Unaligned("a diagonal, or an ellipsis")
        for label, axis in zip(term, axes, strict=True):
            o.factors.join(labels.setdefault(label, axis), axis)
    summed = flat(axis for label, axis in labels.items() if label not in output)
    return _through(o, tuple(labels[label] for label in output), summed=summed)


def _convolution(o: Operands) -> Flow:
    x, weight = o.axes(0), o.axes(1)
    general = o.name == "convolution"
    transposed = o.value(6, default=False) if general else "transpose" in o.name
    groups = o.value(8 if general else 6, 1)
    if groups != 1 or len(x) != len(weight):
        raise Unaligned("groups, or no batch")
    incoming, outgoing = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    o.factors.join(x[1], incoming)
    if o.given(2):
        o.join(o.axes(2), (outgoing,))
    outputs = (x[0], outgoing, *o.fresh(o.shape[2:]))
    return _through(o, outputs, outputs[:2], summed=x[1], added=2 if o.given(2) else None)


def _per_channel(o: Operands) -> Flow:
    """Pooling and interpolation: other places, the same channels."""
    x = o.axes(0)
    spatial = next(int(c) for c in o.name if c.isdigit())
    if len(x) != spatial + 2:
        raise Unaligned("no batch")
    return _through(o, (*x[:2], *o.fresh(o.shape[2:])), x[:2])


def _pad(o: Operands) -> Flow:
    x = o.axes(0)
    kept = len(x) - len(o.value(1, [])) // 2
    return _through(o, (*x[:kept], *o.fresh(o.shape[kept:])), x[:kept])


def _embedding(o: Operands) -> Flow:
    weight, ids = o.axes(0), o.axes(1)
    return _through(o, (*ids, weight[1]))


def _without(position: int, default: int | None = None) -> Rule:
    """Operators that mix one axis, named by an argument, and do the same everywhere along the others."""

    def rule(o: Operands) -> Flow:
        x = o.axes(0)
        axis = o.value(position, default, "dim") % len(x)
        return _through(o, x, (*x[:axis], *x[axis + 1 :]))

    return rule


def _triangle(o: Operands) -> Flow:
    x = o.axes(0)
    return _through(o, x, x[:-2])


def _layer_norm(o: Operands) -> Flow:
    x, normalised = o.axes(0), len(o.value(1, []))
    for position in (2, 3):
        if o.given(position):
            o.join(o.axes(position), x[-normalised:])
    return _through(o, x, x[:-normalised])


def _group_norm(o: Operands) -> Flow:
    x, groups = o.axes(0), o.value(1, 1)
    grouped = o.factors.regroup(x[1:2], (groups, o.factors.size(x[1]) // groups))
    for position in (2, 3):
        if o.given(position):
            o.join(o.axes(position), x[1:2])
    return _through(o, x, (x[0], grouped[0]), sizes={1: grouped[:1]})


def _batch_norm(o: Operands) -> Flow:
    x = o.axes(0)
    for position in range(1, 5):
        if o.given(position):
            o.join(o.axes(position), x[1:2])
    return _through(o, x, x[1:2])


def _reduction(o: Operands) -> Flow:
    x = o.axes(0)
    axes = o.value(1, None, "dim")
    axes = list(range(len(x))) if axes is None or axes == [] else axes if isinstance(axes, list) else [axes]
    if not all(isinstance(axis, int) for axis in axes):
        raise Unaligned("not an axis")
    gone = {axis % len(x) for axis in axes}
    keep = bool(o.value(2, default=False, keyword="keepdim"))
    outputs = tuple(() if k in gone else axis for k, axis in enumerate(x) if keep or k not in gone)
    return _through(o, outputs, summed=flat(x[k] for k in gone) if o.name == "sum" else ())


def _reshape(o: Operands) -> Flow:
    x = o.axes(0)
    outputs = o.factors.regroup(x, o.shape)
    listed: dict[int, Axes] = {}
    if o.name in ("reshape", "view", "_unsafe_view"):
        if not isinstance(o.value(1, None), list):
            raise Unaligned("another dtype")
        listed = {1: outputs}
    elif o.name == "unflatten":
        axis = o.value(1, 0) % len(x)
        listed = {2: outputs[axis : axis + len(o.value(2, []))]}
    elif o.operator.target == "aten.squeeze.default":
        raise Unaligned("a part may have an axis of size 1 where the whole has not")
    return _through(o, outputs, sizes=listed)


def _expand(o: Operands) -> Flow:
    x, shape = o.axes(0), o.shape
    new = len(shape) - len(x)
    outputs = tuple(
        x[k - new] if k >= new and x[k - new] else o.factors.axis(size) for k, size in enumerate(shape)
    )
    return _through(o, outputs, x, sizes={1: outputs})


def _permute(o: Operands) -> Flow:
    x = o.axes(0)
    order = list(range(len(x)))
    if o.name == "permute":
        order = [axis % len(x) for axis in o.value(1, [])]
    else:
        a, b = (0, -1) if o.name == "t" else (o.value(1, 0), o.value(2, 0))
        order[a], order[b] = order[b], order[a]
    return _through(o, tuple(x[k] for k in order))


def _pick(o: Operands) -> Flow:
    """``select`` and ``unbind``: an axis goes."""
    x = o.axes(0)
    axis = o.value(1, 0, "dim") % len(x)
    return _through(o, (*x[:axis], *x[axis + 1 :]))


def _slice(o: Operands) -> Flow:
    x = o.axes(0)
    axis = o.value(1, 0, "dim") % len(x)
    if o.factors.size(x[axis]) == o.shape[axis]:
        return _through(o, x)
    others = (*x[:axis], *x[axis + 1 :])
    return _through(o, (*x[:axis], *o.fresh(o.shape[axis : axis + 1]), *x[axis + 1 :]), others)


def _split(o: Operands) -> Flow:
    """Equal parts are like another axis, of which ``unbind`` would then make them."""
    x, count = o.axes(0), len(o.operator.outputs)
    axis, asked = o.value(2, 0, "dim") % len(x), o.value(1, 1)
    each = o.factors.size(x[axis]) // count
    if o.name != "chunk" and any(size != each for size in (asked if isinstance(asked, list) else [asked])):
        raise Unaligned("unequal parts")
    _, part = o.factors.regroup(x[axis : axis + 1], (count, each))
    listed = {} if o.name == "chunk" else {1: (part,) * (count if isinstance(asked, list) else 1)}
    return _through(o, (*x[:axis], part, *x[axis + 1 :]), sizes=listed)


def _cat(o: Operands) -> Flow:
    operands = [x for x in o.every() if len(x) != 1 or o.factors.size(x[0])]  # an empty one may have any rank
    axis = o.value(1, 0, "dim") % (len(operands[0]) + (o.name == "stack"))
    kept = axis if o.name == "stack" else axis + 1
    for other in operands[1:]:
        o.join(operands[0][:axis], other[:axis])
        o.join(operands[0][kept:], other[kept:])
    before, after = operands[0][:axis], operands[0][kept:]
    return _through(o, (*before, *o.fresh(o.shape[axis : axis + 1]), *after), (*before, *after))


def _named(words: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(words.split(), rule)


RULES: Mapping[str, Rule] = {
    **_named(
        "_to_copy abs add addcdiv addcmul alias atan atan2 bitwise_and bitwise_not bitwise_or celu clamp "
        "clamp_max clamp_min clone contiguous cos cosh detach div elu eq erf exp expm1 floor floor_divide "
        "fmod full_like ge gelu gt hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan le "
        "leaky_relu lerp log log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor lt "
        "masked_fill maximum minimum mish mul nan_to_num ne neg ones_like pow reciprocal relu relu6 "
        "remainder round rsqrt rsub selu sigmoid sign silu sin sinh softplus softsign sqrt square sub tan "
        "tanh threshold to type_as where zeros_like",
        _elementwise,
    ),
    **_named("linear", _linear),
    **_named("bmm matmul mm", _matmul(0)),
    **_named("addmm baddbmm", _matmul(1)),
    **_named("scaled_dot_product_attention", _attention),
    **_named("einsum", _einsum),
    **_named("conv1d conv2d conv3d convolution", _convolution),
    **_named("conv_transpose1d conv_transpose2d conv_transpose3d", _convolution),
    **_named("avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d", _per_channel),
    **_named("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d", _per_channel),
    **_named("upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d", _per_channel),
    **_named("constant_pad_nd pad", _pad),
    **_named("embedding", _embedding),
    **_named("softmax _softmax log_softmax _log_softmax cumsum", _without(1)),
    **_named("tril triu", _triangle),
    **_named("layer_norm rms_norm", _layer_norm),
    **_named("group_norm", _group_norm),
    **_named("batch_norm", _batch_norm),
    **_named("all amax amin any mean sum", _reduction),
    **_named("_unsafe_view flatten reshape squeeze unflatten unsqueeze view", _reshape),
    **_named("expand", _expand),
    **_named("permute t transpose swapaxes", _permute),
    **_named("select unbind", _pick),
    **_named("narrow slice", _slice),
    **_named("chunk split split_with_sizes unsafe_split unsafe_chunk", _split),
    **_named("cat stack", _cat),
}
