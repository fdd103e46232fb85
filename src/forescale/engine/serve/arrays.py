"""NumPy arrays as frames of the channel, and back, under the Open Inference Protocol's data types."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forescale.engine.serve.messages import Tensor
from forescale.engine.wire import Frame

Array = NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""NumPy's type of each data type of ``core.signature.ITEM_BYTES``."""

_DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}


def datatype_of(array: Array) -> str:
    """The protocol's name of an array's type.

    Raises:
        ValueError: it has none.
    """
    try:
        return _DATATYPES[array.dtype.newbyteorder("=")]
    except KeyError as error:
        raise ValueError(f"{array.dtype} is no data type of the protocol") from error


def pack(arrays: Mapping[str, Array]) -> tuple[tuple[Tensor, ...], list[memoryview]]:
    """Describe arrays for a header, and their values as frames.

    A contiguous array is not copied: it must stay unchanged until its frame is sent.

    Raises:
        ValueError: an array's type has no name in the protocol.
    """
    tensors = tuple(
        Tensor(name=name, datatype=datatype_of(array), shape=array.shape) for name, array in arrays.items()
    )
    return tensors, [_octets(array) for array in arrays.values()]


def unpack(tensors: Sequence[Tensor], frames: Sequence[Frame]) -> dict[str, Array]:
    """The arrays that ``pack`` described; they share the frames' memory.

    Raises:
        ValueError: description and frames do not belong together.
    """
    if len(tensors) != len(frames):
        raise ValueError(f"{len(tensors)} tensors are described, {len(frames)} frames came")
    return {tensor.name: _array(tensor, frame) for tensor, frame in zip(tensors, frames, strict=True)}


def _octets(array: Array) -> memoryview:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).reshape(-1).view(np.uint8).data


def _array(tensor: Tensor, frame: Frame) -> Array:
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        raise ValueError(f"{tensor.name}: {tensor.datatype!r} is no data type of the protocol")
    size_bytes = memoryview(frame).nbytes
    if size_bytes != math.prod(tensor.shape) * dtype.itemsize:
        raise ValueError(f"{tensor.name}: {size_bytes:,} bytes for {tensor.datatype} of shape {tensor.shape}")
    return np.frombuffer(frame, dtype=dtype).reshape(tensor.shape)
