"""Tensors as frames of the channel, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forescale.engine.wire import Frame


def pack(tensors: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], list[memoryview]]:
    """Describe tensors for a header, and their values as frames.

    A contiguous CPU tensor is not copied: its frame is its memory, and must stay unchanged until it is sent.

    Returns:
        Name, dtype and shape of each tensor (goes into the header), and one frame per tensor.

    Raises:
        TypeError: a tensor is not dense (sparse, quantised).
    """
    meta: list[dict[str, Any]] = []
    frames: list[memoryview] = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"{name} is {tensor.layout} of {tensor.dtype}; only dense tensors can be sent")
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        meta.append({"name": name, "dtype": dtype, "shape": tuple(tensor.shape)})
        frames.append(dense.reshape(-1).view(torch.uint8).numpy().data)
    return meta, frames


def unpack(meta: Sequence[Mapping[str, Any]], frames: Sequence[Frame]) -> dict[str, Tensor]:
    """The tensors that ``pack`` described, on the CPU.

    They share the frames' memory where its alignment allows that: a frame belongs to its tensor from now on.

    Raises:
        ValueError: description and frames do not belong together.
    """
    if len(meta) != len(frames):
        raise ValueError(f"{len(meta)} tensors are described, {len(frames)} frames came")
    return {entry["name"]: _tensor(entry, frame) for entry, frame in zip(meta, frames, strict=True)}


def _tensor(entry: Mapping[str, Any], frame: Frame) -> Tensor:
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry['name']}: {entry['dtype']!r} is no dtype")
    shape = tuple(entry["shape"])
    size_bytes = memoryview(frame).nbytes
    if size_bytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry['name']}: {size_bytes:,} bytes for {entry['dtype']} of shape {shape}")
    if size_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    octets = torch.frombuffer(frame, dtype=torch.uint8)
    if octets.data_ptr() % dtype.itemsize:  # torch's vector instructions crash on values that straddle
        octets = octets.clone()
    return octets.view(dtype).reshape(shape)
