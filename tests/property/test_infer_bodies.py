"""Whatever a client sends as a body is either understood or refused with a BadRequest."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fake_replicas import DOUBLING
from forescale.core.errors import BadRequest
from forescale.core.signature import ITEM_BYTES, Signature, TensorSpec
from forescale.engine.serve.arrays import DTYPES, Array
from forescale.engine.serve.compression import compress, decompress
from forescale.engine.serve.protocol import format_answer, parse_request

DATATYPES = st.sampled_from(sorted(ITEM_BYTES))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Array]:
    """Inputs of equal rows, with values that JSON can hold."""
    rows = draw(st.integers(1, 4))
    made = {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)):
        shape = (rows, *draw(st.lists(st.integers(1, 3), max_size=2)))
        made[name] = draw(_arrays(DTYPES[draw(DATATYPES)], shape))
    return made


def _arrays(dtype: np.dtype, shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return hnp.arrays(dtype, shape, elements=finite)


def signature_of(values: dict[str, Array]) -> Signature:
    names = {dtype: datatype for datatype, dtype in DTYPES.items()}
    specs = tuple(
        TensorSpec(name=name, datatype=names[array.dtype], shape=(None, *array.shape[1:]))
        for name, array in values.items()
    )
    return Signature(inputs=specs, outputs=specs)


def written(
    values: dict[str, Array], signature: Signature, binary: set[str], *, nested: bool, answer: bool = False
) -> tuple[bytes, int]:
    """A request's body as a client makes it, and the length of its JSON."""
    entries: list[dict[str, Any]] = []
    tail = b""
    for spec in signature.inputs:
        array = values[spec.name]
        entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if spec.name in binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            entry["data"] = array.tolist() if nested else array.ravel().tolist()
        entries.append(entry)
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": answer}}).encode()
    return head + tail, len(head)


@given(tensors(), st.sets(st.sampled_from("abcd")), st.booleans(), st.booleans())
def test_a_request_arrives_as_it_was_sent_and_so_does_the_answer(
    values: dict[str, Array], binary: set[str], nested: bool, answer_binary: bool
) -> None:
    signature = signature_of(values)
    body, length = written(values, signature, binary, nested=nested, answer=answer_binary)
    request = parse_request(body, length, signature)
    for spec, array in zip(signature.inputs, request.inputs, strict=True):
        assert array.dtype == values[spec.name].dtype
        np.testing.assert_array_equal(array, values[spec.name])
    # The answer has the form of a request: read as one it gives the same arrays again.
    parts, json_length = format_answer(request, values, model="m", version="1")
    whole = b"".join(parts)
    fields = json.loads(whole[:json_length])
    again = json.dumps({"inputs": fields["outputs"]}).encode()
    tail = b"" if json_length is None else whole[json_length:]
    echoed = parse_request(again + tail, len(again), signature)
    for spec, array in zip(signature.inputs, echoed.inputs, strict=True):
        np.testing.assert_array_equal(array, values[spec.name])


@given(tensors(), st.sets(st.sampled_from("abcd")), st.data())
def test_a_damaged_body_is_understood_or_refused(
    values: dict[str, Array], binary: set[str], data: st.DataObject
) -> None:
    signature = signature_of(values)
    body, length = written(values, signature, binary, nested=False)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change" if damaged:
                damaged[at] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[at:]
            case _:
                damaged.insert(at, data.draw(st.integers(0, 255)))
    with contextlib.suppress(BadRequest):
        request = parse_request(bytes(damaged), data.draw(st.sampled_from([length, None, 0])), signature)
        assert all(len(array) == request.rows for array in request.inputs)


@given(JSON)
def test_any_json_is_understood_or_refused(fields: object) -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": fields}
    for request in (fields, {"inputs": [fields]}, {"inputs": [entry]}):
        with contextlib.suppress(BadRequest):
            parse_request(json.dumps(request).encode(), None, DOUBLING)


@given(JSON, DATATYPES)
def test_any_data_is_understood_or_refused(data: object, datatype: str) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=(None, 2))
    entry = {"name": "x", "datatype": datatype, "shape": [1, 2], "data": data}
    with contextlib.suppress(BadRequest):
        request = parse_request(
            json.dumps({"inputs": [entry]}, allow_nan=True).encode(),
            None,
            Signature(inputs=(spec,), outputs=(spec,)),
        )
        assert request.inputs[0].tolist() in ([data], data) or datatype.startswith("FP")
        assert np.isfinite(request.inputs[0].astype(np.float64)).all()


@given(st.binary(max_size=3000), st.sampled_from([b"gzip", b"deflate"]), st.integers(0, 3000))
def test_compression_gives_back_what_it_took_and_never_more_than_allowed(
    body: bytes, encoding: bytes, limit_bytes: int
) -> None:
    packed = compress(body, encoding)
    assert decompress(packed, encoding, len(body)) == body
    with contextlib.suppress(BadRequest):
        assert len(decompress(packed, encoding, limit_bytes)) <= limit_bytes
    with contextlib.suppress(BadRequest):
        decompress(body, encoding, limit_bytes)
