"""Sizes that depend on the batch: integer expressions over the graph's symbols.

An expression is what SymPy prints for a symbolic shape (``s77*s53``, ``((s53 - 1)//2) + 1``,
``Max(1, s0)``). Graphs may come from strangers, so an expression is parsed, checked against a short
list of allowed forms and only then compiled; it can name nothing but symbols and the functions below.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from forescale.core.errors import InvalidInput
from forescale.graph.model import Size

_MAX_LENGTH = 20_000
_MAX_POWERS = 4096
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _to_float(a: Any) -> Any:
    return a * 1.0  # float() would turn a torch.SymInt into a constant


def _float_pow(a: Any, b: Any) -> Any:
    plain = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return math.pow(a, b) if plain else a**b  # math.pow makes no complex numbers


def _square_root(a: Any) -> Any:
    return math.sqrt(a) if isinstance(a, (int, float)) else a**0.5


# The functions SymPy and torch.utils._sympy.functions print in shapes.
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Abs": abs,
    "CeilDiv": _ceil_div,
    "CeilToInt": math.ceil,
    "CleanDiv": operator.floordiv,
    "FloatTrueDiv": operator.truediv,
    "FloatPow": _float_pow,
    "FloorDiv": operator.floordiv,
    "FloorToInt": math.floor,
    "IntTrueDiv": operator.truediv,
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "OpaqueUnaryFn_sqrt": _square_root,
    "PythonMod": operator.mod,
    "ToFloat": _to_float,
    "TruncToInt": math.trunc,
    "ceiling": math.ceil,
    "floor": math.floor,
}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod)
ELEMENT_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "int8", "uint8", "qint8", "quint8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of one element by dtype name."""


def evaluate(size: Size, binding: Mapping[str, int]) -> int:
    """The value of one size under ``binding`` (symbol -> value).

    Raises:
        InvalidInput: not a size expression, or a symbol without a value.
    """
    if isinstance(size, int):
        return size
    names, function = _single(size)
    return _whole(_call(function, names, binding)[0], size)


def compile_sizes(sizes: Sequence[Size], symbols: Sequence[str]) -> Callable[[Mapping[str, int]], list[int]]:
    """Compile many sizes once; the result maps a binding to their values, in order.

    Equal expressions are computed once, so the thousands of sizes of a deep model cost as much as
    the few dozen of one of its layers.

    Raises:
        InvalidInput: an expression that is malformed or names something not in ``symbols``.
    """
    distinct = list(dict.fromkeys(sizes))
    place = {size: index for index, size in enumerate(distinct)}
    places = [place[size] for size in sizes]
    function = _compile(distinct, symbols)

    def values(binding: Mapping[str, int]) -> list[int]:
        raw = _call(function, symbols, binding)
        whole = [
            value if type(value) is int else _whole(value, size)
            for value, size in zip(raw, distinct, strict=True)
        ]
        return [whole[index] for index in places]

    return values


def compile_numbers(
    numbers: Sequence[str], symbols: Sequence[str]
) -> Callable[[Mapping[str, int]], list[float]]:
    """Like :func:`compile_sizes`, for expressions whose value need not be whole (``IntTrueDiv(1, s27)``)."""
    function = _compile(numbers, symbols)
    return lambda binding: list(_call(function, symbols, binding))


def violated(conditions: Iterable[Size], binding: Mapping[str, int]) -> Size | None:
    """The first of a graph's conditions that does not hold (is negative) under ``binding``, if any."""
    return next((c for c in conditions if evaluate(c, binding) < 0), None)


def product(factors: Iterable[Size]) -> Size:
    """The product of sizes, e.g. of a shape's axes; constants are folded, factors are in one order."""
    constant, symbolic = 1, list[str]()
    for factor in factors:
        if isinstance(factor, int):
            constant *= factor
        else:
            symbolic.append(_grouped(factor))
    if constant == 0 or not symbolic:
        return constant
    return "*".join([*([str(constant)] if constant != 1 else []), *sorted(symbolic)])


def total(terms: Iterable[Size]) -> Size:
    """The sum of sizes; constants are folded and equal terms gathered."""
    constant, counts = 0, dict[str, int]()
    for term in terms:
        if isinstance(term, int):
            constant += term
        else:
            counts[term] = counts.get(term, 0) + 1
    symbolic = [str(product((count, term))) for term, count in sorted(counts.items())]
    if not symbolic:
        return constant
    return " + ".join([*symbolic, *([str(constant)] if constant else [])])


def tensor_bytes(shape: Iterable[Size], dtype: str) -> Size:
    """Bytes of a dense tensor.

    Raises:
        InvalidInput: an unknown dtype.
    """
    if dtype not in ELEMENT_BYTES:
        raise InvalidInput(f"unknown dtype {dtype!r}; known are {', '.join(sorted(ELEMENT_BYTES))}")
    return product((ELEMENT_BYTES[dtype], *shape))


def _grouped(factor: str) -> str:
    """``factor`` in a form that can stand in a product without changing its value."""
    return factor if re.fullmatch(r"\w+(\*\w+)*", factor) else f"({factor})"


@lru_cache(maxsize=65536)
def _single(size: str) -> tuple[tuple[str, ...], Callable[..., tuple[Any, ...]]]:
    names = sorted({n.id for n in ast.walk(_parse(size)) if isinstance(n, ast.Name)} - _FUNCTIONS.keys())
    return tuple(names), _compile([size], names)


def _compile(sizes: Sequence[Size], symbols: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """One function of the symbols, by position, that returns the tuple of all sizes."""
    for symbol in symbols:
        if not _IDENTIFIER.fullmatch(symbol) or keyword.iskeyword(symbol) or symbol in _FUNCTIONS:
            raise InvalidInput(f"{symbol!r} cannot be the name of a symbol")
    elements: list[ast.expr] = []
    for size in sizes:
        expression = ast.Constant(size) if isinstance(size, int) else _parse(size)
        _check(expression, size, frozenset(symbols))
        elements.append(expression)
    parameters = [ast.arg(symbol) for symbol in symbols]
    arguments = ast.arguments(posonlyargs=[], args=parameters, kwonlyargs=[], kw_defaults=[], defaults=[])
    function = ast.Lambda(arguments, ast.Tuple(elements, ast.Load()))
    try:
        code = compile(ast.fix_missing_locations(ast.Expression(function)), "<sizes>", "eval")
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise InvalidInput("a size expression is nested too deeply") from error
    return eval(code, {"__builtins__": {}, **_FUNCTIONS})  # noqa: S307 - every node was checked


def _parse(size: str) -> ast.expr:
    if len(size) > _MAX_LENGTH:
        raise InvalidInput(f"a size expression of {len(size)} characters is too long")
    try:
        return ast.parse(size.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidInput(f"{size[:80]!r} is not a size expression") from error


def _check(expression: ast.expr, size: Size, symbols: frozenset[str]) -> None:
    """Refuse every form but the allowed ones (walks without recursion: depth is the stranger's choice)."""
    pending: list[ast.expr] = [expression]
    powers = 1  # bounds how far nested powers can grow a number
    while pending:
        node = pending.pop()
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                pass
            case ast.Name(id=name) if name in symbols:
                pass
            case ast.BinOp(left=base, op=ast.Pow(), right=ast.Constant(value=int(power))) if (
                power > 0 and (powers := powers * power) <= _MAX_POWERS
            ):
                pending.append(base)
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATORS):
                pending += (left, right)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                pending.append(operand)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                pending += args
            case _:
                raise InvalidInput(
                    f"the size {str(size)[:80]!r} has {_shown(node)}, which is not allowed there"
                )


def _shown(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return f"the unknown symbol {node.id!r}"
    return repr(ast.unparse(node)[:40])


def _call(
    function: Callable[..., tuple[Any, ...]], names: Sequence[str], binding: Mapping[str, int]
) -> tuple[Any, ...]:
    try:
        return function(*[binding[name] for name in names])
    except KeyError as error:
        raise InvalidInput(f"no value for the symbol {error.args[0]!r}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InvalidInput(f"a size has no value for {dict(binding)}: {error}") from error


def _whole(value: Any, size: Size) -> int:
    if not isinstance(value, float):
        return value  # also torch.SymInt, when memory is traced with symbolic shapes
    if not value.is_integer():
        raise InvalidInput(f"the size {str(size)[:80]!r} is {value}, not a whole number")
    return int(value)
