from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.core.errors import InvalidInput
from forescale.graph.size import compile_sizes, evaluate, product, tensor_bytes, total

BINDING = {"s0": 7, "s1": 12}


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (5, 5),
        ("s0*s1", 84),
        ("(((s0 - 1)//2)) + 1", 4),
        ("s1**2", 144),
        ("-s0 + s1", 5),
        ("Max(1, s0 - 10)", 1),
        ("Mod(s1, 5)", 2),
        ("CeilDiv(s0, 2)", 4),
        ("TruncToInt(IntTrueDiv(s0, 2))", 3),
        ("s1/2", 6),
        ("s0 % 4", 3),
    ],
)
def test_evaluates_what_sympy_prints(size: int | str, value: int) -> None:
    assert evaluate(size, BINDING) == value
    assert compile_sizes([size, size], ["s0", "s1"])(BINDING) == [value, value]


@pytest.mark.parametrize(
    "size",
    [
        "__import__('os').system('true')",
        "s0.__class__",
        "(lambda: 1)()",
        "[s0][0]",
        "open",
        "s2",
        "s0 if s1 else 2",
        "'a'*s0",
        "True",
        "Max(*s0)",
        "Max(key=1)",
        "2**s0",
        "((9**99)**99)**99",
        "s0 +",
        "(" * 5000,
        "-" * 19_000 + "1",
        "1" * 30_000,
        "s0\n+1",
        "s1//(s0 - 7)",
        "s0/2",
        "Mod(s0)",
        "float",
    ],
)
def test_refuses_everything_else_in_one_line(size: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        compile_sizes([size], ["s0", "s1"])(BINDING)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("symbol", ["Max", "__builtins__", "s 0", "lambda"])
def test_refuses_symbols_that_are_not_plain_names(symbol: str) -> None:
    with pytest.raises(InvalidInput):
        compile_sizes(["1"], [symbol])


def test_names_the_symbol_without_a_value() -> None:
    with pytest.raises(InvalidInput, match="'s1'"):
        evaluate("s0*s1", {"s0": 1})
    with pytest.raises(InvalidInput, match="'s1'"):
        compile_sizes(["s0*s1"], ["s0", "s1"])({"s0": 1})


SIZES = st.one_of(
    st.integers(-9, 9),
    st.sampled_from(
        ["s0", "s1", "s0*s1", "s0 - s1", "(((s0 - 1)//2)) + 1", "-s1", "s0**2", "s1//2*s0", "3*s1"]
    ),
)


@given(st.lists(SIZES))
def test_products_and_sums_have_the_value_of_their_parts(sizes: list[int | str]) -> None:
    values = compile_sizes(sizes, ["s0", "s1"])(BINDING)
    expected = 1
    for value in values:
        expected *= value
    assert evaluate(product(sizes), BINDING) == expected
    assert evaluate(total(sizes), BINDING) == sum(values)


def test_equal_shapes_give_equal_expressions() -> None:
    assert product(("s1", 2, "s0", 4)) == product((8, "s0", "s1")) == "8*s0*s1"
    assert total((product(("s0", "s1")), product(("s1", "s0")), 0)) == "2*s0*s1"
    assert product(("s0", 0)) == 0


def test_bytes_of_a_tensor() -> None:
    assert evaluate(tensor_bytes(("s0", 3), "bfloat16"), BINDING) == 42
    with pytest.raises(InvalidInput, match="float77"):
        tensor_bytes((1,), "float77")


@pytest.mark.parametrize("module", ["size", "cost", "json_format", "model"])
def test_planning_needs_no_torch(module: str) -> None:
    code = f"import sys, forescale.graph.{module}; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
