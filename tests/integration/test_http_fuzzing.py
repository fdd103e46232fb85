"""Whatever is sent, the answer is one that the OpenAPI document declares, and no fault of the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from forescale.api.management import management
from forescale.api.openapi import document
from forescale.engine.serve.app import App
from served_app import served_app

Post = Callable[[bytes, int], httpx.Response]
ROUTES = (*App.operations, *management(cast(Any, None), cast(Any, None), Path()).routes)
SCHEMA = schemathesis.openapi.from_dict(document(ROUTES))
CASES = [
    (f"{route.method} {route.path}", mode)
    for route in ROUTES
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or route.query or route.takes  # else nothing can be wrong
]
NAMES = {"model": ("double", "absent"), "version": ("1", "2", "3", "production"), "alias": ("production",)}
"""Values that mean something, besides those that are made up."""


def binary_body(values: list[float]) -> tuple[bytes, int]:
    """A request with a tensor as bytes, and the length of its JSON."""
    tail = np.array(values, np.float32).tobytes()
    entry = {"name": "x", "datatype": "FP32", "shape": [len(values) // 2, 2]}
    tensor = {**entry, "parameters": {"binary_data_size": len(tail)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + tail, len(head)


GOOD = binary_body([1, 2])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_app(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.fixture(scope="module")
def post(url: str) -> Iterator[Post]:
    with httpx.Client(base_url=url) as client:
        yield lambda body, length: client.post(
            "/v2/models/double/infer",
            content=body,
            headers={"inference-header-content-length": str(length)},
        )


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_answers_are_as_documented(url: str, operation: str, mode: GenerationMode) -> None:
    method, path = operation.split()

    @settings(max_examples=12)
    @given(case=SCHEMA[path][method].as_strategy(generation_mode=mode), data=st.data())
    def check(case: Case, data: st.DataObject) -> None:
        for name in case.path_parameters or {}:
            known = data.draw(st.sampled_from((*NAMES[name], None)))
            if known is not None:
                case.path_parameters[name] = known
        # What is well formed may still not fit the model, or name nobody: that is for other tests.
        case.call_and_validate(base_url=url, excluded_checks=[positive_data_acceptance])

    check()


def test_the_document_is_valid_and_is_what_the_server_says(url: str) -> None:
    SCHEMA.validate()
    told = httpx.get(f"{url}/openapi.json").json()
    assert told == SCHEMA.raw_schema
    assert {f"{method.upper()} {path}" for path, methods in told["paths"].items() for method in methods} == {
        f"{route.method} {route.path}" for route in ROUTES
    }


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(width=32), min_size=2, max_size=8).filter(lambda values: len(values) % 2 == 0),
    at=st.floats(0, 1),
    damage=st.sampled_from(("none", "cut", "more", "bytes", "length")),
    junk=st.binary(min_size=1, max_size=20),
)
def test_tensors_as_bytes_are_answered_or_refused(
    post: Post, values: list[float], at: float, damage: str, junk: bytes
) -> None:
    whole, length = binary_body(values)
    body = bytearray(whole)
    place = round(at * len(body))
    match damage:
        case "cut":
            del body[place:]
        case "more":
            body[place:place] = junk
        case "bytes":
            body[place : place + len(junk)] = junk
        case "length":
            length = place
        case _:
            pass
    answer = post(bytes(body), length)
    assert answer.status_code == 200 if damage == "none" else answer.status_code in {200, 400}, answer.text
    if damage == "none":  # NaN and infinities pass as bytes
        at_byte = int(answer.headers["inference-header-content-length"])
        twice = np.frombuffer(answer.content[at_byte:], np.float32)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(twice, np.array(values, np.float32) * np.float32(2))
    elif answer.status_code == 400:
        assert set(answer.json()) == {"error"}
    assert post(*GOOD).status_code == 200
