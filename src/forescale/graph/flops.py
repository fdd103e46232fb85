"""Floating-point operations of one operator, as expressions over the graph's symbols.

A multiplication with its addition counts 2. Gradients are counted one by one: a matrix product costs its
forward again for each of its two factors that needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forescale.graph.model import Buffer, ModelGraph, Operator, Parameter, Size, Tensor
from forescale.graph.size import product, tensor_bytes, total

Shape = tuple[Size, ...]
Flops = tuple[Size, Size]
"""Forward and backward."""


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


VIEWS = _names(
    "alias as_strided chunk detach diagonal expand expand_as flatten imag lift_fresh lift_fresh_copy "
    "movedim narrow permute real select slice split split_with_sizes squeeze swapaxes t tensor_split "
    "transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as view_as_complex "
    "view_as_real"
)
"""Operators that only describe existing memory anew."""

COPIES = _names(
    "_to_copy arange cat clone constant_pad_nd contiguous copy empty empty_like fill flip full full_like "
    "hstack index_put new_empty new_full new_ones new_zeros ones ones_like pad pixel_shuffle "
    "pixel_unshuffle repeat repeat_interleave reshape roll scalar_tensor stack tile to tril triu type_as "
    "vstack zeros zeros_like"
)
"""Operators that move or make elements and compute nothing."""

GATHERS = _names("embedding gather index index_select take take_along_dim")
"""Operators that read from a table as many elements as they return."""

_NORMALISATIONS = _names(
    "_native_batch_norm_legit batch_norm group_norm instance_norm layer_norm native_batch_norm "
    "native_group_norm native_layer_norm rms_norm _fused_rms_norm"
)
_SOFTMAXES = _names(
    "_log_softmax _softmax cross_entropy_loss log_softmax logsumexp nll_loss nll_loss_nd softmax"
)
_REDUCTIONS = _names(
    "all amax amin any argmax argmin binary_cross_entropy binary_cross_entropy_with_logits count_nonzero "
    "cumprod cumsum huber_loss kl_div l1_loss linalg_vector_norm max mean min mse_loss norm prod "
    "smooth_l1_loss sort std sum topk var var_mean"
)
_CAUSAL_BLOCK = 512


class Call:
    """One operator with the shapes of what it reads and makes."""

    def __init__(self, graph: ModelGraph, operator: Operator) -> None:
        self._graph = graph
        self._operator = operator
        self.name = operator.target.split(".")[1] if operator.target.startswith("aten.") else operator.target

    def argument(self, position: int, keyword: str = "", default: Any = None) -> Any:
        if position < len(self._operator.args):
            return self._operator.args[position]
        return self._operator.kwargs.get(keyword, default)

    def shape(self, reference: Any) -> Shape:
        """Shape of the tensor, parameter or buffer an argument refers to."""
        return self._entry(reference).shape

    def _entry(self, reference: Any) -> Tensor | Parameter | Buffer:
        ((kind, name),) = reference.items()
        tables: Mapping[str, Mapping[str, Any]] = {
            "tensor": self._graph.tensors,
            "parameter": self._graph.parameters,
            "buffer": self._graph.buffers,
        }
        return tables[kind][name]

    def needs_gradient(self, reference: Any) -> bool:
        match self._entry(reference):
            case Tensor(requires_grad=needed) | Parameter(trainable=needed):
                return needed
            case Buffer():
                return False

    def dtype(self, reference: Any) -> str:
        return self._entry(reference).dtype

    @property
    def input_elements(self) -> Size:
        """Elements of the largest-rank operand that comes first."""
        shapes = [self._graph.tensors[n].shape for n in self._operator.inputs]
        shapes += [self._graph.parameters[n].shape for n in self._operator.parameters]
        return product(max(shapes, key=len)) if shapes else 0

    @property
    def output_elements(self) -> Size:
        return total(product(self._graph.tensors[n].shape) for n in self._operator.outputs if n)

    @property
    def output_shape(self) -> Shape:
        return self._graph.tensors[next(n for n in self._operator.outputs if n)].shape

    @property
    def gradients(self) -> int:
        """Number of operands that need a gradient."""
        tensors = sum(self._graph.tensors[n].requires_grad for n in self._operator.inputs)
        return tensors + sum(self._graph.parameters[n].trainable for n in self._operator.parameters)

    @property
    def matrices(self) -> list[Shape]:
        """Shapes of the parameters that are matrices."""
        shapes = (self._graph.parameters[n].shape for n in self._operator.parameters)
        return [shape for shape in shapes if len(shape) > 1]

    @property
    def parameter_elements(self) -> Size:
        return total(product(self._graph.parameters[n].shape) for n in self._operator.parameters)

    @property
    def first_input(self) -> tuple[Shape, str]:
        """Shape and dtype of the first tensor it reads."""
        tensor = self._graph.tensors[self._operator.inputs[0]]
        return tensor.shape, tensor.dtype


def operator_flops(call: Call) -> Flops:
    """FLOPs of the operator's forward and of the gradients that training takes through it."""
    if call.name.startswith("module:"):
        return _module(call)
    if call.name in VIEWS or call.name in COPIES:
        return 0, 0
    if call.name in _RULES:
        return _RULES[call.name](call)
    if call.name in GATHERS:
        return 0, product((min(call.gradients, 1), call.output_elements))
    if call.name in _NORMALISATIONS:  # mean 1, variance 2, normalise 2, scale and shift 2
        return _per_input(call, forward=7, backward=14)
    if call.name in _SOFTMAXES:  # maximum, difference, exponential, sum, quotient
        return _per_input(call, forward=5, backward=5)
    if call.name in _REDUCTIONS or call.name.startswith("adaptive_"):
        return _per_input(call, forward=1, backward=1)
    return call.output_elements, product((call.gradients, call.output_elements))


def _per_input(call: Call, *, forward: int, backward: int) -> Flops:
    differentiated = min(call.gradients, 1)
    return product((forward, call.input_elements)), product((backward * differentiated, call.input_elements))


def _contraction(call: Call, forward: Size, operands: Sequence[Any]) -> Flops:
    """Each gradient of a bilinear operator costs as much as its forward."""
    return forward, product((sum(call.needs_gradient(o) for o in operands), forward))


def _matmul(first: int) -> Callable[[Call], Flops]:
    """Products of matrices, the left one being argument ``first``."""

    def rule(call: Call) -> Flops:
        left, right = call.argument(first), call.argument(first + 1)
        return _contraction(call, product((2, *call.output_shape, call.shape(left)[-1])), (left, right))

    return rule


def _convolution(call: Call) -> Flops:
    signal, weight = call.argument(0), call.argument(1)
    transposed = "transpose" in call.name or ("convolution" in call.name and call.argument(6))
    # Every element of the output (of the input, if transposed) meets one filter; groups are in its shape.
    places = call.shape(signal) if transposed else call.output_shape
    return _contraction(call, product((2, *places, *call.shape(weight)[1:])), (signal, weight))


def _einsum(call: Call) -> Flops:
    """Pairwise from left to right, as PyTorch contracts without opt_einsum."""
    equation, operands = str(call.argument(0)).replace(" ", ""), call.argument(1)
    terms, arrow, result = equation.partition("->")
    labels = [_labels(term, len(call.shape(o))) for term, o in zip(terms.split(","), operands, strict=True)]
    sizes = {
        k: size
        for axes, o in zip(labels, operands, strict=True)
        for k, size in zip(axes, call.shape(o), strict=True)
    }
    kept = set(_labels(result, len(call.output_shape))) if arrow else set(sizes)
    left, flows = set(labels[0]), call.needs_gradient(operands[0])
    forward, backward = list[Size](), list[Size]()
    for position, (right, operand) in enumerate(zip(labels[1:], operands[1:], strict=True), start=1):
        both = left | set(right)
        forward.append(product((2, *(sizes[k] for k in sorted(both)))))
        backward += forward[-1:] * (flows + call.needs_gradient(operand))
        flows |= call.needs_gradient(operand)
        left = both & kept.union(*labels[position + 1 :])
    return total(forward), total(backward)


def _labels(term: str, rank: int) -> list[str]:
    """One label per axis; those of an ellipsis are counted from the right, as they are broadcast."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f"...{k}" for k in range(hidden, 0, -1)), *after] if dots else [*before]


def _attention(call: Call) -> Flops:
    """Scaled dot-product attention, as the kernel that runs it computes it.

    Without dropout the fused kernel (FlashAttention, Dao 2023) runs: its backward recomputes the scores,
    5 products against the forward's 2, and with ``is_causal`` it skips blocks of 512 keys that lie wholly
    after their queries, so that sequences up to 512 cost the full square. With dropout, or with
    a mask that needs a gradient, the scores are materialised: full square, 4 products in backward.
    """
    query, key, value = (call.argument(k) for k in range(3))
    *batch, queries, width = call.shape(query)
    keys, value_width = call.shape(key)[-2], call.shape(value)[-1]
    fused = attention_is_fused(call)
    causal = bool(call.argument(5, "is_causal", default=False))
    pairs = _causal_pairs(queries, keys) if fused and causal else product((queries, keys))
    scores, mixing = (product((2, *batch, pairs, w)) for w in (width, value_width))
    if not any(call.needs_gradient(o) for o in (query, key, value)):
        return total((scores, mixing)), 0
    recomputed = [scores] if fused else []
    return total((scores, mixing)), total((*recomputed, scores, scores, mixing, mixing))


def attention_is_fused(call: Call) -> bool:
    mask = call.argument(3, "attn_mask")
    return not call.argument(4, "dropout_p", 0.0) and (mask is None or not call.needs_gradient(mask))


def materialised_scores(call: Call) -> Size:
    """Bytes by which unfused attention moves its scores: product, softmax and dropout, in and out."""
    if call.name != "scaled_dot_product_attention" or attention_is_fused(call):
        return 0
    query, key = call.argument(0), call.argument(1)
    return product((6, tensor_bytes((*call.shape(query)[:-1], call.shape(key)[-2]), call.dtype(query))))


def _causal_pairs(queries: Size, keys: Size) -> Size:
    """Query-key pairs when a query sees all keys up to the end of its block of 512."""
    diagonal = queries if queries == keys else f"Min({queries}, {keys})"
    blocks = f"(({diagonal})//{_CAUSAL_BLOCK})"
    half = _CAUSAL_BLOCK * _CAUSAL_BLOCK // 2
    whole = product(
        (half, blocks, f"({blocks} + 1)")
    )  # n whole blocks of queries see 1, 2 … n blocks of keys
    rest = product((f"({diagonal}) % {_CAUSAL_BLOCK}", f"Min({keys}, {_CAUSAL_BLOCK}*({blocks} + 1))"))
    below = 0 if queries == keys else product((f"({queries}) - {diagonal}", keys))
    return total((whole, rest, below))


def _recurrent(call: Call) -> Flops:
    """Every weight matrix meets every time step of every row once."""
    shape, _ = call.first_input
    rows = product(shape[:-1])
    forward = total(product((2, rows, *matrix)) for matrix in call.matrices)
    return forward, product((2 * min(call.gradients, 1), forward))


def _pooling(call: Call) -> Flops:
    kernel = call.argument(1)
    window = kernel if isinstance(kernel, list) else [kernel]
    axes = next(int(c) for c in call.name if c.isdigit())
    elements = product((*call.output_shape, *(window if len(window) == axes else window * axes)))
    return elements, product((min(call.gradients, 1), elements))


def _module(call: Call) -> Flops:
    """A whole module: every parameter meets every row; a rough guess for what cannot be looked into."""
    shape, dtype = call.first_input
    if "int" in dtype:
        rows = shape  # token ids
    elif len(shape) > 3:
        rows = (shape[0], *shape[2:])  # images: channels are the second axis
    else:
        rows = shape[:-1]
    forward = product((2, *rows, call.parameter_elements))
    return forward, product((2 * min(call.gradients, 1), forward))


_RULES: Mapping[str, Callable[[Call], Flops]] = {
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot", "vdot", "inner"), _matmul(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), _matmul(1)),
    "linear": _matmul(0),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _pooling),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _pooling),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _pooling),
}
