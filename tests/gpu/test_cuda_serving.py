"""Replicas' models on a GPU: the same answers as on a CPU, also in batches one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.serve.formats import Order, format_named
from forescale.engine.serve.formats.transfer import Transfer

pytestmark = pytest.mark.gpu

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=1 << 30)
GPU = Device(name="cuda0", kind=DeviceKind.CUDA, memory_bytes=1 << 30)


def test_arrays_pass_through_pinned_memory_unchanged() -> None:
    transfer = Transfer(GPU)
    arrays = [np.random.default_rng(n).standard_normal((1 << 12, 64)).astype(np.float32) for n in range(20)]
    tensors = [transfer.tensor(array) for array in arrays]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    back = transfer.arrays([str(n) for n in range(20)], tensors)
    for n, array in enumerate(arrays):
        np.testing.assert_array_equal(back[str(n)], array)


def test_an_archive_answers_as_on_a_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)).eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (torch.zeros(2, 8),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "m.pt2")
    order = Order(path=tmp_path / "m.pt2")
    here, there = (format_named("pt2").load(order, device) for device in (CPU, GPU))
    name = here.signature.inputs[0].name
    for n in range(1, 40):
        x = np.random.default_rng(n).standard_normal((n, 8)).astype(np.float32)
        for output, expected in here.run({name: x}).items():
            np.testing.assert_allclose(there.run({name: x})[output], expected, rtol=1e-3, atol=1e-4)
