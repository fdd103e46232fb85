"""Headers survive msgpack, and nonsense is refused."""

from __future__ import annotations

from typing import get_args

import msgpack
import numpy as np
import pytest

from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve import messages
from forescale.engine.serve.arrays import DTYPES, datatype_of, pack, unpack
from forescale.engine.serve.messages import (
    Beat,
    Credit,
    Drain,
    Failed,
    Hello,
    Left,
    Load,
    Result,
    Run,
    Tensor,
    Threads,
    Warm,
    from_replica,
    to_replica,
)

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 3)),),
    outputs=(TensorSpec(name="y", datatype="INT64", shape=(None,)),),
)
TENSORS = (Tensor(name="x", datatype="FP32", shape=(2, 3)),)
SAID = [
    Warm(process_bytes=3, common_bytes=4),
    Hello(
        model="m",
        version="1",
        replica="replica-1/m.1.1",
        signature=SIGNATURE,
        max_rows=8,
        load_s=0.5,
        model_bytes=7,
    ),
    Credit(n=2),
    Result(batch=7, seconds=0.25, outputs=TENSORS, threads=3),
    Failed(error="it broke", failure="model", batch=7),
    Failed(error="no such file", failure="load"),
    Beat(model_bytes={"m.1.1": 8}),
    Left(),
]
ASKED = [
    Load(model="m", version="1", format="pt2", path="m.pt2", options={"a": [1]}, signature=SIGNATURE),
    Load(model="m", version="1", format="pt2", path="m.pt2", trust=True, threads=2),
    Run(batch=7, inputs=TENSORS),
    Threads(threads=4),
    Drain(),
]


@pytest.mark.parametrize("message", SAID)
def test_what_replicas_say_survives_the_wire(message: messages.FromReplica) -> None:
    assert from_replica(msgpack.unpackb(msgpack.packb(message.to_header()))) == message


@pytest.mark.parametrize("message", ASKED)
def test_what_replicas_are_asked_survives_the_wire(message: messages.ToReplica) -> None:
    assert to_replica(msgpack.unpackb(msgpack.packb(message.to_header()))) == message


def test_every_message_is_tried_above() -> None:
    assert {type(message) for message in (*SAID, *ASKED)} == {
        *get_args(messages.FromReplica),
        *get_args(messages.ToReplica),
    }


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"type": "run"},
        {"type": "credit", "n": "2"},
        {"type": "credit", "n": -1},
        {"type": "result", "batch": 1, "seconds": 0.1, "outputs": [["y", "FP32", [-1]]]},
        {"type": "result", "batch": 1, "seconds": 0.1, "outputs": 3},
        {"type": "beat", "model_bytes": 3},
        {"type": "beat", "model_bytes": {"m.1.1": -3}},
        {"type": "failed", "batch": 1, "error": "x", "kind": "mood"},
        {**SAID[1].to_header(), "signature": {"inputs": [], "outputs": []}},
    ],
)
def test_nonsense_is_refused(header: dict) -> None:
    with pytest.raises(ValueError, match=r": "):
        from_replica(header)


def test_the_bootstraps_words_are_understood() -> None:
    assert from_replica({"type": "connected", "pid": 1}) is None
    assert from_replica({"type": "failed", "error": "KeyError: x", "traceback": "..."}) == Failed(
        error="KeyError: x", failure="crash"
    )


@pytest.mark.parametrize("datatype", DTYPES)
def test_arrays_come_back_as_they_were(datatype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[datatype])
    tensors, frames = pack({"straight": array, "turned": array.T, "none": array[:0]})
    back = unpack(tensors, frames)
    assert [tensor.datatype for tensor in tensors] == [datatype] * 3
    assert all(
        np.array_equal(back[name], expected)
        for name, expected in (("straight", array), ("turned", array.T), ("none", array[:0]))
    )
    assert np.shares_memory(back["straight"], array)


def test_foreign_byte_order_is_turned() -> None:
    tensors, frames = pack({"x": np.array([1, 2], dtype=">i4")})
    assert unpack(tensors, frames)["x"].tolist() == [1, 2]


def test_what_has_no_name_in_the_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="complex128"):
        datatype_of(np.zeros(1, dtype=np.complex128))


@pytest.mark.parametrize(
    ("tensor", "size_bytes"),
    [
        (Tensor(name="x", datatype="FP32", shape=(2,)), 7),
        (Tensor(name="x", datatype="BYTES", shape=(2,)), 8),
    ],
)
def test_frames_must_fit_their_description(tensor: Tensor, size_bytes: int) -> None:
    with pytest.raises(ValueError, match="x: "):
        unpack([tensor], [bytes(size_bytes)])
    with pytest.raises(ValueError, match="frames came"):
        unpack([tensor], [])
