from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.core.errors import InvalidInput
from forescale.graph.json_format import from_json, to_json
from forescale.graph.model import (
    Buffer,
    BufferUpdate,
    MemoryEvent,
    ModelGraph,
    Operator,
    Parameter,
    SavedStorage,
    SymbolSource,
    Tensor,
)

NAMES = st.text(min_size=1, max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.just({"device": None}),
)
WORDS = st.sampled_from([{"dtype": "float32"}, {"size": "s0 + 1"}, {"memory_format": "channels_last"}])
ARGUMENTS = st.recursive(st.one_of(SCALARS, WORDS), lambda inner: st.lists(inner, max_size=3), max_leaves=5)


def operator(index: int, inputs: tuple[str, ...], output: str, **changes: Any) -> Operator:
    defaults: dict[str, Any] = {
        "index": index,
        "name": f"operator {index}",
        "target": "aten.linear.default",
        "args": tuple({"tensor": name} for name in inputs),
        "kwargs": {},
        "outputs": (output,),
        "returns_tuple": False,
        "module_path": "",
        "source": "",
        "random": False,
        "inputs": inputs,
        "parameters": (),
        "buffers": (),
        "mutated_buffers": (),
    }
    return Operator(**{**defaults, **changes})


@st.composite
def graphs(draw: st.DrawFn) -> ModelGraph:
    names = draw(st.lists(NAMES, min_size=2, max_size=6, unique=True))
    operators: list[Operator] = []
    for index, output in enumerate(names[1:]):
        inputs = tuple(draw(st.lists(st.sampled_from(names[: index + 1]), max_size=3, unique=True)))
        reads = index == 0
        operators.append(
            operator(
                index,
                inputs,
                output,
                args=(*({"tensor": n} for n in inputs), *draw(st.lists(ARGUMENTS, max_size=3))),
                kwargs={
                    **draw(st.dictionaries(st.sampled_from(["alpha", "dim"]), ARGUMENTS)),
                    "w": [{"parameter": "p"}, {"buffer": "b"}],
                }
                if reads
                else {},
                target=draw(st.sampled_from(["aten.add.Tensor", "aten.__and__.Tensor", "module:a.0.b"])),
                outputs=(output, None),
                returns_tuple=draw(st.booleans()),
                source=draw(st.text(max_size=5)),
                parameters=("p",) if reads else (),
                buffers=("b",) if reads else (),
                mutated_buffers=("b",) if reads else (),
            )
        )
    tensors = {
        name: Tensor(
            name=name,
            producer=position - 1 if position else None,
            consumers=tuple(o.index for o in operators if name in o.inputs),
            shape=tuple(draw(st.lists(st.sampled_from([1, 2, "s0", "s0*3 - 1"]), max_size=3)))
            if position
            else ("s0", 4),
            dtype=draw(st.sampled_from(["float32", "int64"])),
            requires_grad=draw(st.booleans()),
        )
        for position, name in enumerate(names)
    }
    return ModelGraph(
        operators=tuple(operators),
        tensors=tensors,
        parameters={"p": Parameter(name="p", aliases=("q",), shape=(2, 3), dtype="float32", trainable=True)},
        buffers={"b": Buffer(name="b", aliases=(), shape=(), dtype="int64", persistent=draw(st.booleans()))},
        buffer_updates=(BufferUpdate(buffer="b", tensor=names[-1]),),
        inputs=(names[0],),
        outputs=(names[-1],),
        symbols={"s0": SymbolSource(tensor=names[0], axis=0)},
        example={"s0": draw(st.integers(1, 100))},
        saved=(SavedStorage(name="x#0", operators=(0,), size_bytes="4*s0"),),
        memory=(
            MemoryEvent(operator=0, backward=False, storage="#0", size_bytes="4*s0", begins=True),
            MemoryEvent(
                operator=len(operators), backward=True, storage="#0", size_bytes="4*s0", begins=False
            ),
        ),
    )


@given(graphs())
def test_round_trip_is_exact(graph: ModelGraph) -> None:
    text = to_json(graph)
    again = from_json(text)
    assert again == graph
    assert to_json(again) == text
    assert json.loads(text)["format"] == 1


def chain() -> ModelGraph:
    return ModelGraph(
        operators=(operator(0, ("x",), "y"), operator(1, ("y",), "z")),
        tensors={
            "x": Tensor(
                name="x", producer=None, consumers=(0,), shape=("s0", 4), dtype="float32", requires_grad=False
            ),
            "y": Tensor(
                name="y", producer=0, consumers=(1,), shape=("s0",), dtype="float32", requires_grad=True
            ),
            "z": Tensor(name="z", producer=1, consumers=(), shape=(), dtype="float32", requires_grad=True),
        },
        parameters={},
        buffers={},
        buffer_updates=(),
        inputs=("x",),
        outputs=("z",),
        symbols={"s0": SymbolSource(tensor="x", axis=0)},
        example={"s0": 2},
    )


def test_nan_survives() -> None:
    graph = chain()
    graph = replace(
        graph, operators=(replace(graph.operators[0], kwargs={"value": [float("nan")]}), graph.operators[1])
    )
    value = from_json(to_json(graph)).operators[0].kwargs["value"][0]
    assert math.isnan(value)


OPERATOR = ("operators", 0)
WRONG: list[tuple[tuple[Any, ...], Any]] = [
    (("format",), 2),
    (("format",), True),
    (("colour",), 1),
    ((*OPERATOR, "colour"), 1),
    ((*OPERATOR, "index"), 1),
    ((*OPERATOR, "index"), "0"),
    ((*OPERATOR, "random"), 0),
    ((*OPERATOR, "inputs"), ["nothing"]),
    ((*OPERATOR, "inputs"), []),
    ((*OPERATOR, "inputs"), ["z"]),
    ((*OPERATOR, "outputs"), ["nothing"]),
    ((*OPERATOR, "parameters"), ["nothing"]),
    ((*OPERATOR, "buffers"), ["nothing"]),
    ((*OPERATOR, "mutated_buffers"), ["nothing"]),
    ((*OPERATOR, "target"), "load_library"),
    ((*OPERATOR, "target"), "load_library.__func__.__call__"),
    ((*OPERATOR, "kwargs"), {"a=print(1),b": 1}),
    ((*OPERATOR, "kwargs"), {"lambda": 1}),
    ((*OPERATOR, "args", 0), {"code": "1"}),
    ((*OPERATOR, "args", 0), {"tensor": "x", "size": 1}),
    ((*OPERATOR, "args", 0), {"tensor": ["x"]}),
    ((*OPERATOR, "args", 0), {"tensor": "z"}),
    ((*OPERATOR, "args"), [{"tensor": "x"}, {"dtype": "print(1)"}]),
    ((*OPERATOR, "args"), [{"tensor": "x"}, {"layout": "device"}]),
    ((*OPERATOR, "args"), [{"tensor": "x"}, {"size": "open('x')"}]),
    ((*OPERATOR, "args"), [{"tensor": "x"}, {"float": "1"}]),
    (("tensors", "x", "shape"), ["s9"]),
    (("tensors", "x", "shape"), [1.5]),
    (("tensors", "x", "name"), "y"),
    (("tensors", "x", "consumers"), [1]),
    (("tensors", "x", "consumers"), []),
    (("tensors", "y", "producer"), None),
    (("tensors", "y", "producer"), -1),
    (("tensors", "y", "producer"), 7),
    (("inputs",), ["nothing"]),
    (("outputs",), "z"),
    (("buffer_updates",), [{"buffer": "nothing", "tensor": "z"}]),
    (("symbols", "s0", "axis"), 5),
    (("symbols", "s0", "tensor"), "z"),
    (("example",), {}),
    (("saved",), [{"name": "x", "operators": [9], "size_bytes": 4}]),
    (("memory",), [{"operator": 3, "backward": True, "storage": "x", "size_bytes": 4, "begins": True}]),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_refuses_what_is_wrong_in_one_line(path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(to_json(chain()))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InvalidInput) as caught:
        from_json(json.dumps(document))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format":1,"inputs":NaN}', b"\xff"])
def test_refuses_what_is_no_graph(text: str | bytes) -> None:
    with pytest.raises(InvalidInput):
        from_json(text)


def test_refuses_a_missing_key() -> None:
    document = json.loads(to_json(chain()))
    del document["operators"][1]["source"]
    with pytest.raises(InvalidInput, match=r"operators\[1\] lacks the key 'source'"):
        from_json(json.dumps(document))
