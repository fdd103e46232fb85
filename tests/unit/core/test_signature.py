"""Signatures as JSON: what one writes the other reads, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature, TensorSpec, signature_as_json, signature_from_json

TENSOR: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [-1, 2]}


def test_a_signature_survives_json() -> None:
    signature = Signature(
        inputs=(
            TensorSpec(name="ids", datatype="INT64", shape=(None, None)),
            TensorSpec(name="mask", datatype="BOOL", shape=(None, 7)),
        ),
        outputs=(TensorSpec(name="scores", datatype="FP16", shape=(3, 10)),),
    )
    written = json.loads(json.dumps(signature_as_json(signature)))
    assert written["inputs"][1] == {"name": "mask", "datatype": "BOOL", "shape": [-1, 7]}
    assert signature_from_json(written) == signature


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (None, "lists of 'inputs' and 'outputs'"),
        ({"inputs": [TENSOR]}, "lists of 'inputs' and 'outputs'"),
        ({"inputs": [TENSOR], "outputs": [TENSOR], "more": 1}, "nothing else"),
        ({"inputs": [TENSOR], "outputs": "x"}, "lists of 'inputs' and 'outputs'"),
        ({"inputs": [TENSOR], "outputs": []}, "a model needs an output"),
        ({"inputs": [TENSOR, TENSOR], "outputs": [TENSOR]}, "different names"),
        ({"inputs": [{**TENSOR, "name": 3}], "outputs": [TENSOR]}, "each tensor"),
        ({"inputs": [{**TENSOR, "unit": "m"}], "outputs": [TENSOR]}, "each tensor"),
        ({"inputs": [{**TENSOR, "shape": [1.0]}], "outputs": [TENSOR]}, "-1 for any"),
        ({"inputs": [{**TENSOR, "shape": [True]}], "outputs": [TENSOR]}, "-1 for any"),
        ({"inputs": [{**TENSOR, "shape": [-2]}], "outputs": [TENSOR]}, "-1 for any"),
        ({"inputs": [{**TENSOR, "shape": [0]}], "outputs": [TENSOR]}, "lengths from 1 on"),
        ({"inputs": [{**TENSOR, "datatype": "BYTES"}], "outputs": [TENSOR]}, "'BYTES' is not one of"),
    ],
)
def test_anything_else_is_refused(fields: object, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        signature_from_json(fields)
