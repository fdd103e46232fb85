from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from fake_replicas import DOUBLING
from forescale.core.errors import BadRequest
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.protocol import format_answer, format_error, format_metadata, parse_request


def body(**inputs: Any) -> dict[str, Any]:
    """A request for DOUBLING, with one thing changed."""
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2], **inputs}]}


def parse(fields: object, tail: bytes = b"", signature: Signature = DOUBLING):
    head = json.dumps(fields).encode()
    return parse_request(head + tail, len(head) if tail else None, signature)


def one(datatype: str, *shape: int | None) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", datatype=datatype, shape=shape),),
        outputs=(TensorSpec(name="y", datatype=datatype, shape=shape),),
    )


@pytest.mark.parametrize("data", [[1, 2, 3, 4.5], [[1, 2], [3, 4.5]]], ids=["flat", "nested"])
def test_json_tensors_are_flat_or_nested(data: list) -> None:
    request = parse(body(shape=[2, 2], data=data))
    assert request.inputs[0].dtype == np.float32
    assert request.inputs[0].tolist() == [[1, 2], [3, 4.5]]
    assert (request.rows, request.size_bytes) == (2, 16)


def test_three_axes_nest_as_well() -> None:
    values = np.arange(24).reshape(2, 3, 4)
    for data in (values.tolist(), values.reshape(-1).tolist()):
        fields = body(datatype="INT16", shape=[2, 3, 4], data=data)
        assert np.array_equal(parse(fields, signature=one("INT16", None, 3, 4)).inputs[0], values)


def test_a_tensor_sent_as_bytes_looks_into_the_body() -> None:
    values = np.array([[1, np.nan]], np.float32)
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
            ]
        }
    ).encode()
    whole = head + values.tobytes()
    request = parse_request(whole, len(head), DOUBLING)
    np.testing.assert_array_equal(request.inputs[0], values)
    assert np.shares_memory(request.inputs[0], np.frombuffer(whole, np.uint8))


def test_bytes_stand_in_the_order_of_the_request_not_of_the_model() -> None:
    signature = Signature(
        inputs=(
            TensorSpec(name="a", datatype="UINT8", shape=(None,)),
            TensorSpec(name="b", datatype="UINT8", shape=(None,)),
            TensorSpec(name="c", datatype="UINT8", shape=(None,)),
        ),
        outputs=DOUBLING.outputs,
    )
    entries = [
        {"name": "c", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
        {"name": "b", "datatype": "UINT8", "shape": [2], "data": [7, 8]},
        {"name": "a", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
    ]
    request = parse({"inputs": entries}, b"\x01\x02\x03\x04", signature)
    assert [values.tolist() for values in request.inputs] == [[3, 4], [7, 8], [1, 2]]


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT8", [-128, 127]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP16", [0.5, -65504]),
        ("FP64", [1e308, 3]),
        ("BOOL", [True, False]),
    ],
)
def test_every_value_of_a_data_type_is_taken(datatype: str, data: list) -> None:
    request = parse(body(datatype=datatype, data=data), signature=one(datatype, None, 2))
    assert request.inputs[0].tolist() == [data]


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT8", [0, 128]),
        ("UINT8", [0, -1]),
        ("INT32", [0, 1.5]),
        ("INT32", [0, None]),
        ("UINT64", [0, 2**64]),
        ("FP32", [0, "1"]),
        ("FP32", [0, None]),
        ("FP32", [0, [1]]),
        ("FP32", [0, 1e39]),
        ("FP16", [0, 65520]),
        ("BOOL", [True, 1]),
        ("BOOL", [True, "false"]),
        ("FP32", {"0": 1, "1": 2}),
        ("FP32", "12"),
        ("FP32", []),
        ("FP32", [1]),
        ("FP32", [1, 2, 3]),
        ("FP32", [[1], [2]]),
        ("FP32", [[1, 2], [3, 4]]),
        ("FP32", [[1, 2], 3]),
        ("FP32", [[[1, 2]]]),
        ("FP32", [["1", "2"]]),
    ],
)
def test_a_value_of_another_type_or_shape_is_refused(datatype: str, data: object) -> None:
    with pytest.raises(BadRequest, match="x: "):
        parse(body(datatype=datatype, data=data), signature=one(datatype, None, 2))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([], "JSON object"),
        ({}, "'inputs'"),
        ({"inputs": []}, "'inputs'"),
        ({"inputs": {"x": 1}}, "'inputs'"),
        ({"inputs": ["x"]}, "object with a name"),
        ({"inputs": [{"name": 1}]}, "object with a name"),
        ({"inputs": body()["inputs"] * 2}, "twice"),
        (body(name="z"), "'x' is missing"),
        ({"inputs": [*body()["inputs"], {"name": "z"}]}, "no input 'z'"),
        (body(datatype="FP64"), "takes FP32, not 'FP64'"),
        (body(datatype=None), "takes FP32"),
        (body(shape=[2, 1]), r"takes shape \[any, 2\], not \[2, 1\]"),
        (body(shape=[2]), "takes shape"),
        (body(shape=[0, 2], data=[]), "'shape'"),
        (body(shape=[-1, 2]), "'shape'"),
        (body(shape=[True, 2]), "'shape'"),
        (body(shape="12"), "'shape'"),
        (body(shape=[10**15, 2]), "values for shape"),
        (body(parameters=3), "'parameters'"),
        (body(parameters={"shared_memory_region": "a"}), "shared memory"),
        ({**body(), "parameters": []}, "'parameters'"),
        ({**body(), "parameters": {"priority": -1}}, "'priority'"),
        ({**body(), "parameters": {"priority": True}}, "'priority'"),
        ({**body(), "parameters": {"timeout": "soon"}}, "'timeout'"),
        ({**body(), "parameters": {"sequence_id": 3}}, "sequences"),
        ({**body(), "parameters": {"binary_data_output": 1}}, "'binary_data_output'"),
        ({**body(), "id": 5}, "'id'"),
        ({**body(), "outputs": []}, "'outputs'"),
        ({**body(), "outputs": [{"name": "z"}]}, "no output 'z', but y"),
        ({**body(), "outputs": [{"name": "y"}, {"name": "y"}]}, "twice"),
        ({**body(), "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "'binary_data'"),
        ({**body(), "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(fields: object, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as refused:
        parse(fields)
    assert refused.value.status == 400
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"inputs": NaN}', b"[" * 5000, b'{"a": 1e999}'])
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest, match="not JSON"):
        parse_request(text, None, DOUBLING)


@pytest.mark.parametrize(
    ("size_bytes", "tail", "says"),
    [
        (8, b"\0" * 7, "7 bytes are there"),
        (8, b"\0" * 9, "1 bytes of the body belong to no input"),
        (4, b"\0" * 4, "is 8 bytes, not 4"),
        (-8, b"\0" * 8, "'binary_data_size'"),
        ("8", b"\0" * 8, "'binary_data_size'"),
        (8.0, b"\0" * 8, "'binary_data_size'"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(size_bytes: object, tail: bytes, says: str) -> None:
    fields = body(parameters={"binary_data_size": size_bytes})
    del fields["inputs"][0]["data"]
    with pytest.raises(BadRequest, match=says):
        parse(fields, tail)


def test_data_twice_is_refused() -> None:
    with pytest.raises(BadRequest, match="one of them"):
        parse(body(parameters={"binary_data_size": 8}), b"\0" * 8)


def test_a_bool_of_another_byte_is_refused() -> None:
    entry = {"name": "x", "datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}}
    with pytest.raises(BadRequest, match="0 or 1"):
        parse({"inputs": [entry]}, b"\x01\x02", one("BOOL", None))


@pytest.mark.parametrize("length", [-1, 10**12])
def test_a_json_part_longer_than_the_body_is_refused(length: int) -> None:
    with pytest.raises(BadRequest, match="JSON part"):
        parse_request(json.dumps(body()).encode(), length, DOUBLING)


def test_all_inputs_need_as_many_rows() -> None:
    signature = Signature(
        inputs=(*DOUBLING.inputs, TensorSpec(name="z", datatype="INT8", shape=(None,))),
        outputs=DOUBLING.outputs,
    )
    z = {"name": "z", "datatype": "INT8", "shape": [2], "data": [1, 2]}
    with pytest.raises(BadRequest, match="x 1, z 2"):
        parse({"inputs": [*body()["inputs"], z]}, signature=signature)


def test_priority_and_timeout_are_read() -> None:
    request = parse({**body(), "parameters": {"priority": 3, "timeout": 250_000, "unknown": []}})
    assert (request.priority, request.timeout_s) == (3, 0.25)
    plain = parse({**body(), "parameters": {"priority": 0, "timeout": 0}})
    assert (plain.priority, plain.timeout_s) == (0, None)


def test_free_lengths_tell_which_requests_can_share_a_batch() -> None:
    signature = one("INT8", None, None, 2)
    short = parse(body(datatype="INT8", shape=[2, 1, 2], data=[0] * 4), signature=signature)
    long = parse(body(datatype="INT8", shape=[1, 3, 2], data=[0] * 6), signature=signature)
    assert (short.free_lengths, long.free_lengths) == ((1,), (3,))


def test_an_answer_in_json() -> None:
    request = parse({**body(), "id": "seven"})
    parts, length = format_answer(request, {"y": np.array([[2, np.nan]], np.float32)}, model="m", version="3")
    assert length is None
    assert json.loads(b"".join(parts)) == {
        "model_name": "m",
        "model_version": "3",
        "id": "seven",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2, None]}],
    }


def test_an_answer_as_bytes() -> None:
    request = parse({**body(), "parameters": {"binary_data_output": True}})
    parts, length = format_answer(request, {"y": np.array([[2, 4]], np.float32)}, model="m", version="3")
    whole = b"".join(parts)
    assert length is not None
    (output,) = json.loads(whole[:length])["outputs"]
    assert output == {
        "name": "y",
        "datatype": "FP32",
        "shape": [1, 2],
        "parameters": {"binary_data_size": 8},
    }
    assert struct.unpack("<2f", whole[length:]) == (2, 4)


def test_an_answer_has_the_outputs_that_were_asked_for_as_they_were() -> None:
    signature = Signature(
        inputs=DOUBLING.inputs,
        outputs=tuple(TensorSpec(name=name, datatype="INT8", shape=(None,)) for name in "abc"),
    )
    wanted = [{"name": "c"}, {"name": "a", "parameters": {"binary_data": False}}]
    fields = {**body(), "parameters": {"binary_data_output": True}, "outputs": wanted}
    outputs = {name: np.array([number], np.int8) for number, name in enumerate("abc")}
    parts, length = format_answer(parse(fields, signature=signature), outputs, model="m", version="1")
    assert length is not None
    whole = b"".join(parts)
    c, a = json.loads(whole[:length])["outputs"]
    assert (c["name"], c["parameters"]["binary_data_size"], whole[length:]) == ("c", 1, b"\x02")
    assert (a["name"], a["data"]) == ("a", [0])


def test_outputs_of_any_layout_can_be_sent() -> None:
    odd = np.frombuffer(b"\0" + np.arange(4, dtype=np.float32).tobytes(), np.float32, offset=1)
    for values in (odd.reshape(2, 2), np.arange(4, dtype=np.float32).reshape(2, 2).T):
        for binary in (False, True):
            request = parse({**body(), "parameters": {"binary_data_output": binary}})
            parts, length = format_answer(request, {"y": values}, model="m", version="1")
            if binary:
                assert np.frombuffer(b"".join(parts)[length:], np.float32).tolist() == values.ravel().tolist()
            else:
                assert json.loads(b"".join(parts))["outputs"][0]["data"] == values.ravel().tolist()


def test_metadata_and_errors() -> None:
    assert json.loads(format_metadata("m", ["1", "2"], DOUBLING)) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "forescale",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert json.loads(format_error('it "broke"')) == {"error": 'it "broke"'}
