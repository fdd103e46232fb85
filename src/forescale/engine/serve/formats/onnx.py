"""ONNX models, run by onnxruntime (``forescale[onnx]``); the file holds operators and weights, no code.

On a GPU, too, batches run one by one: onnxruntime copies and waits by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import LoadedModel, Order, at_once, refuse_other_names

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}


def inspect(order: Order) -> Signature:
    """Ask onnxruntime, which reads the whole file."""
    session = _session(order, threads=1, providers=["CPUExecutionProvider"])
    return order.signature or _signature(session)


def load(order: Order, device: Device) -> LoadedModel:
    """Make a session on the device's cores or accelerator."""
    on_gpu = device.kind is DeviceKind.CUDA
    providers = ["CUDAExecutionProvider"] if on_gpu else ["CPUExecutionProvider"]
    threads = order.threads or len(device.cores)
    session = _session(order, threads=threads, providers=providers)
    found = _signature(session)
    declared = order.signature or found
    refuse_other_names(declared, found)
    names = [spec.name for spec in declared.outputs]
    rows = [given.shape[0] for given in session.get_inputs() if isinstance(given.shape[0], int)]

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return LoadedModel(
        signature=declared,
        run=at_once(run),
        least_rows=max(rows, default=1),
        most_rows=min(rows, default=None),
        threads=threads or None,
    )


def _session(order: Order, *, threads: int, providers: list[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InvalidInput("ONNX models need onnxruntime: pip install 'forescale[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 0: all that the process may use
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(order.path), options, providers=providers)
    except Exception as error:
        # onnxruntime's errors have no common class but this one.
        line = next(iter(str(error).splitlines()), "")[:300]
        raise InvalidInput(f"{order.path.name} is no ONNX model that onnxruntime can run ({line})") from error


def _signature(session: Any) -> Signature:
    return Signature(
        inputs=tuple(_spec(given) for given in session.get_inputs()),
        outputs=tuple(_spec(given) for given in session.get_outputs()),
    )


def _spec(given: Any) -> TensorSpec:
    if given.type not in _DATATYPES:
        raise InvalidInput(f"{given.name} is a {given.type}, which the protocol does not know")
    tail = (length if isinstance(length, int) else None for length in given.shape[1:])
    return TensorSpec(
        name=given.name, datatype=_DATATYPES[given.type], shape=(None, *tail) if given.shape else ()
    )
