"""How batches travel from the coordinator to workers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch

from forescale.engine.tensors import pack, unpack
from forescale.engine.train.task import map_batch
from forescale.engine.wire import Message


@dataclass(frozen=True, slots=True)
class _Sent:
    """Stands for a tensor of the batch that travels as a frame of its own."""

    name: str


def encode_batch(inputs: Mapping[str, torch.Tensor], batch: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Header part and frames of a batch for a worker; ``batch`` None where no loss is computed."""
    tensors = dict(inputs)

    def leave_out(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        name = f"batch:{len(tensors)}"
        tensors[name] = leaf
        return _Sent(name)

    structure = map_batch(leave_out, batch)
    meta, frames = pack(tensors)
    return meta, [cloudpickle.dumps(structure), *frames]


def decode_batch(message: Message, device: torch.device) -> tuple[dict[str, torch.Tensor], Any]:
    """The batch inputs in a message, and the whole batch if the receiver computes the loss (else None)."""
    received = unpack(message.header["tensors"], message.frames[1:])
    tensors = {name: tensor.to(device) for name, tensor in received.items()}
    structure = pickle.loads(message.frames[0])  # noqa: S301 - only the coordinator can send
    batch = map_batch(
        lambda leaf: tensors.pop(leaf.name) if isinstance(leaf, _Sent) else leaf,
        structure,
        lambda value: isinstance(value, _Sent),
    )
    return tensors, batch
